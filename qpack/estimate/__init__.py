"""How much memory a model needs, for serving and for training: arithmetic on shapes, before anything is loaded.

Sizes in bytes, GB of 10**9. A formula stands beside each part with its source; what cannot be derived is an allowance,
and says so. `qpack.estimate.training` is within a tenth of what a CPU run measures (tests/estimate); no GPU was at
hand. Where a model keeps less than is assumed (sliding windows are counted as full attention), the estimate is on the
safe side.
"""

from qpack.estimate.device import Device
from qpack.estimate.fitting import Fit, fit
from qpack.estimate.model import Model
from qpack.estimate.need import ALLOWANCE, CARDS, Need
from qpack.estimate.serving import serving
from qpack.estimate.training import training

__all__ = ["ALLOWANCE", "CARDS", "Device", "Fit", "Model", "Need", "fit", "serving", "training"]
