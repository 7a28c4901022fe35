"""Where in the user's own code something happens: the innermost frame outside of torch and of this package."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator

import torch

_LIBRARIES = tuple(os.path.join(os.path.dirname(os.path.abspath(path)), "") for path in (__file__, str(torch.__file__)))


def _frames(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_users(frame: types.FrameType) -> bool:
    """Whether ``frame`` runs code of the user's, or of a package other than torch and this one."""
    return not frame.f_code.co_filename.startswith((*_LIBRARIES, "<frozen "))


def asked_by_torch() -> bool:
    """Whether the innermost frame outside of this package is one of torch's."""
    own, others = _LIBRARIES
    outside = (frame.f_code.co_filename for frame in _frames(sys._getframe(1)))
    return next((name for name in outside if not name.startswith(own)), "").startswith(others)


def user_line() -> str:
    """``file:line`` of the innermost frame of the user's; empty where there is none."""
    found = next(filter(is_users, _frames(sys._getframe(1))), None)
    return f"{found.f_code.co_filename}:{found.f_lineno}" if found is not None else ""


def line_of(error: BaseException) -> str:
    """``file:line`` of the innermost frame of the user's that ``error`` came through; empty where there is none."""
    place = ""
    step = error.__traceback__
    while step is not None:
        if is_users(step.tb_frame):
            place = f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}"
        step = step.tb_next
    return place


def users_stacklevel() -> int:
    """For a warning raised in the calling function: the level of the innermost frame of the user's."""
    frames = list(_frames(sys._getframe(1)))
    return next((level for level, frame in enumerate(frames, 1) if is_users(frame)), len(frames))
