"""The whole main job on a real model: pack it, train two skills, serve both beside the base, merge one."""

from qpack.demo.report import DemoReport
from qpack.demo.run import run

__all__ = ["DemoReport", "run"]
