"""The serving process: ``python -m serve.child LISTENER CONTROL``, two descriptors that `serve.supervisor` hands over.

vLLM starts its engine's process anew from the main module, so this one imports nothing that it does not need at once.
"""

import logging
import socket
import sys

from qpack import terminal
from qpack.errors import QpackError
from serve.control import Parent


def main() -> None:
    """Serve what the parent sends on the socket that it has bound, until it says otherwise."""
    listener, control = (socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:3])
    listener.set_inheritable(False)
    parent = Parent(control)
    config, registry, level = parent.receive()
    terminal.configure_logging(verbose=level <= logging.DEBUG, quiet=level > logging.INFO)
    from serve import engine

    try:
        engine.run(config, registry, listener, parent)
    except QpackError as error:
        parent.failed(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
