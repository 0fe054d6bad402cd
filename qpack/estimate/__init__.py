"""How much memory a model needs, for serving and for training: arithmetic on shapes, before anything is loaded.

Sizes in bytes, GB of 10**9. A formula stands beside each part with its source; what cannot be derived is an allowance,
and says so. `qpack.estimate.training` is within a tenth of what torch's allocator gives out in a CPU run, and with the
allowances within a tenth of the most that the process has resident (tests/estimate); no GPU was at hand. Where a model
keeps less than is assumed (sliding windows are counted as full attention), the estimate is on the safe side.
"""

from qpack.estimate.device import Device
from qpack.estimate.fitting import Fit, fit
from qpack.estimate.model import Model
from qpack.estimate.need import ALLOWANCE, CARDS, Need
from qpack.estimate.serving import serving
from qpack.estimate.training import training

__all__ = ["ALLOWANCE", "CARDS", "Device", "Fit", "Model", "Need", "fit", "serving", "training"]
