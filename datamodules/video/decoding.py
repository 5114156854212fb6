"""Frames of video files by their number: decoded by PyAV, from the first one on, so that a number means the same frame everywhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.pictures import MAX_PIXELS
from lit_methods.datamodules.reading import AGAIN, INCOMPLETE, reading

# containers that hold their own frames: playlists and lists of files would lead elsewhere
_FORMATS = "avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpeg,mpegts,asf,flv,ogg"
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", "enable_drefs": "0"}
MAX_FRAMES = 1 << 20  # of a file; more are asked for by a damaged header alone


@contextmanager
def _opened(path: Path, field: str, missing: str) -> Iterator[tuple[Any, Any]]:
    """An open file and its first video stream.

    Raises:
        ImportError: PyAV isn't installed.
        MissingFileError: There is no such file.
        BrokenRecordError: It is no video, has no frames, or frames that are too large; anything that the decoder says.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path.name} is a video file, which needs PyAV: pip install 'lit-methods[video]'") from error
    with reading(path, field, "a video", missing=missing), av.open(str(path.absolute()), options=_OPTIONS) as container:
        if not container.streams.video:
            raise BrokenRecordError(path, field, f"has no video stream: another file, {AGAIN}")
        stream = container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS or min(width, height) < 1:
            raise BrokenRecordError(path, field, f"has frames of {width} x {height} pixels: damaged, {AGAIN}")
        stream.codec_context.thread_count = 1  # readers are processes of their own
        yield container, stream


def frame_count(path: Path, field: str = "video", missing: str = INCOMPLETE) -> int:
    """Frames of a video file, counted without decoding them.

    Args:
        path: The file.
        field: What it is to the data set, for messages.
        missing: What to do where there is no such file, for the message.

    Raises:
        ImportError: PyAV isn't installed.
        MissingFileError: There is no such file.
        BrokenRecordError: It is no video, is damaged, or has fewer frames than its header says.
    """
    with _opened(path, field, missing) as (container, stream):
        claimed, found = stream.frames, sum(1 for packet in container.demux(stream) if packet.size)
        if not 0 < found < MAX_FRAMES or found < claimed:
            raise BrokenRecordError(path, field, f"its header claims {claimed} frames and {found} follow: truncated, {AGAIN}")
    return found


def read_frames(path: Path, numbers: NDArray[np.int64], field: str = "video", missing: str = INCOMPLETE) -> NDArray[np.uint8]:
    """Some frames of a video file.

    The file is decoded from its first frame to the last one that is wanted: numbers are places in the order of display, and don't depend on
    key frames or time stamps.

    Args:
        path: The file.
        numbers: (N,) from 0, in any order, also repeated; N >= 1.
        field: What the file is to the data set, for messages.
        missing: What to do where there is no such file, for the message.

    Returns:
        (N, H, W, 3) RGB.

    Raises:
        ImportError: PyAV isn't installed.
        MissingFileError: There is no such file.
        BrokenRecordError: It is no video, ends before the last frame, a frame on the way is damaged, or frames have different sizes.
    """
    wanted, place = np.unique(numbers, return_inverse=True)
    found: list[NDArray[np.uint8]] = []
    number = -1
    with _opened(path, field, missing) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise BrokenRecordError(path, f"{field}, frame {number}", f"is damaged: {AGAIN}")
            if number == wanted[len(found)]:
                found.append(frame.to_ndarray(format="rgb24"))
                if found[-1].shape != found[0].shape:
                    sizes = " and ".join(f"{one.shape[1]} x {one.shape[0]}" for one in (found[0], found[-1]))
                    raise BrokenRecordError(path, f"{field}, frame {number}", f"frames of {sizes} pixels: {AGAIN}")
                if len(found) == len(wanted):
                    break
        if len(found) < len(wanted):
            raise BrokenRecordError(
                path, field, f"has {number + 1} frames, and frame {wanted[len(found)]} (from 0) is asked for: truncated, or another video"
            )
    return np.stack(found)[place.reshape(-1)]


def write_video(path: Path, frames: NDArray[np.uint8], rate: int = 25) -> None:
    """Write frames (T, H, W, 3), H and W even, as MPEG-4 into a container of the file's ending; for tests and tiny releases.

    Raises:
        ImportError: PyAV isn't installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"writing {path.name} needs PyAV: pip install 'lit-methods[video]'") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        stream.codec_context.thread_count = 1
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


__all__ = ["frame_count", "read_frames", "write_video"]
