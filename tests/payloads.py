"""Pickles that would run something if a reader let them, in as many forms as the pickle machine has for a call."""

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

Program = tuple[str, bytes]


def _text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def _arguments(words: tuple[str, ...]) -> bytes:
    return b"(" + b"".join(_text(word) for word in words) + b"t"


def gadgets(mark: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """(module, name, arguments) of calls that would make the file ``mark``, directly or by a module in the current folder."""
    code, file = f"open({str(mark)!r}, 'w').close()", str(mark)
    touch = f"touch {mark}"
    return [
        ("builtins", "exec", (code,)),
        ("builtins", "eval", (code,)),
        ("builtins", "open", (file, "w")),
        ("builtins", "__import__", ("evil_of_the_folder",)),
        ("builtins", "compile", (code, "x", "exec")),
        ("__builtin__", "eval", (code,)),
        ("io", "open", (file, "w")),
        ("_io", "FileIO", (file, "w")),
        ("os", "system", (touch,)),
        ("posix", "system", (touch,)),
        ("os", "popen", (touch,)),
        ("subprocess", "getoutput", (touch,)),
        ("subprocess", "check_output", (touch,)),
        ("importlib", "import_module", ("evil_of_the_folder",)),
        ("runpy", "run_module", ("evil_of_the_folder",)),
        ("runpy", "run_path", ("evil_of_the_folder.py",)),
        ("pathlib", "Path.touch", (file,)),
        ("timeit", "timeit", (code,)),
        ("cProfile", "run", (code,)),
        ("pdb", "run", (code,)),
        ("logging", "FileHandler", (file,)),
        ("shutil", "copy", ("evil_of_the_folder.py", file)),
        ("os", "symlink", ("evil_of_the_folder.py", file)),
        ("pickle", "loads", (code,)),
        ("torch", "load", (file,)),
        ("torch.hub", "load", (file, "x")),
        ("numpy", "save", (file, "x")),
        ("numpy", "fromfile", (file,)),
        ("numpy", "memmap", (file, "u1", "w+")),
        ("numpy.testing._private.utils", "runstring", (code,)),
        ("numpy.f2py.diagnose", "run", ()),
        ("evil_of_the_folder", "run", ()),
        ("lit_methods.files", "write_atomically", (file, "x")),
        ("codecs", "open", (file, "w")),
        ("_codecs", "encode", ("x", "evil_of_the_folder")),
        ("torch.serialization", "load", (file,)),
        ("torch._dynamo.utils", "import_submodule", (file,)),
        ("operator", "methodcaller", ("touch",)),
        ("functools", "partial", (code,)),
        ("collections", "OrderedDict.fromkeys", (code,)),
    ]


def programs(mark: Path) -> Iterator[Program]:
    """Name and bytes of each pickle."""
    for module, name, words in gadgets(mark):
        title, where = f"{module}.{name}", f"{module}\n{name}\n".encode()
        yield f"{title} reduce", b"\x80\x02c" + where + _arguments(words) + b"R."
        yield f"{title} stack", b"\x80\x04" + _text(module) + _text(name) + b"\x93" + _arguments(words) + b"R."
        yield f"{title} inst", b"(" + b"".join(b"S" + repr(word).encode() + b"\n" for word in words) + b"i" + where + b"."
        yield f"{title} obj", b"(c" + where + b"".join(_text(word) for word in words) + b"o."
        yield f"{title} newobj", b"\x80\x02c" + where + _arguments(words) + b"\x81."
        yield f"{title} newobj_ex", b"\x80\x04c" + where + _arguments(words) + b"}\x92."
        yield f"{title} build", b"\x80\x02c" + where + _arguments(words) + b"b."
        yield f"{title} in a dict", b"\x80\x02}" + _text("data") + b"c" + where + _arguments(words) + b"Rs."
        yield f"{title} as a key", b"\x80\x02}c" + where + _arguments(words) + b"RK\x01s."
    yield "extension", b"\x80\x02\x82\x01."
    yield "persistent", b"Pevil\n."
    yield "buffer", b"\x80\x05\x97."


def object_array(program: bytes) -> bytes:
    """A .npy file that says that its values are pickled."""
    head = str({"descr": "|O", "fortran_order": False, "shape": ()}).encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + program


def archive(members: dict[str, bytes]) -> bytes:
    """A zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def torch_archive(program: bytes) -> bytes:
    """A file in the form of torch.save."""
    return archive({"a/data.pkl": program, "a/byteorder": b"little", "a/version": b"3\n", "a/.format_version": b"1"})


def torch_legacy(program: bytes) -> bytes:
    """A file in the form of torch.save before 1.6."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps([], 2)
