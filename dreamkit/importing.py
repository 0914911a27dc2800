"""Importing Python files that a user names, and the files beside them.

A folder is a package under a name of its own, which its path makes. ``import blocks`` in one of
its files means the ``blocks.py`` beside it, also where a function imports late, so that two
folders' files of one name do not meet. ``sys.path`` stays as it is.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

PREFIX = "dreamkit_folder_"
"""Of the names of the packages that folders are."""
_STAMP = "__dreamkit_stamp__"


def import_file(path: str | Path) -> ModuleType:
    """Return a ``.py`` file as a module, run if it has not been or if it or a neighbour changed.

    It may import the files beside it, by their names or relative to it, and what lies in the folder
    above or in the working folder. In a package it is a module of that package.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: whatever the file raises.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    importlib.invalidate_caches()  # a file may be younger than what was listed of its folder
    top = _top(file.parent)
    for folder in {*_homes(file), top}:
        _forget_if_changed(folder)
    inside = file.parent.relative_to(top).parts
    is_package = file.stem == "__init__"
    package = _package(top)
    for number in range(1, len(inside) + 1 - is_package):  # as importing a module of it does
        importlib.import_module(".".join((package, *inside[:number])))
    name = ".".join((package, *inside, *(() if is_package else (file.stem.replace(".", "_"),))))
    if name in sys.modules:
        return sys.modules[name]
    folders = [str(file.parent)] if is_package else None
    loader = _Loader(name, str(file))
    spec = importlib.util.spec_from_file_location(
        name, file, loader=loader, submodule_search_locations=folders
    )
    if spec is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_named(name: str) -> ModuleType:
    """Import a module; one that is not on ``sys.path`` may lie in the working folder.

    Raises:
        ModuleNotFoundError: there is none.
        Exception: whatever it raises.
    """
    importlib.invalidate_caches()
    if not lies_here(name):
        return importlib.import_module(name)
    _forget_if_changed(Path.cwd())
    return importlib.import_module(f"{_package(Path.cwd())}.{name}")


def lies_here(name: str) -> bool:
    """Whether a module is found in the working folder, and not on ``sys.path``."""
    top = name.partition(".")[0]
    return _installed(top) is None and _spec_in(Path.cwd(), top) is not None


def failure(error: BaseException, module: str = "") -> str:
    """Return an error of a user's code: its kind, its message, and the line that it came from.

    Args:
        error: as it was caught.
        module: what is the user's besides the files that were imported by their paths.
    """
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    theirs = [
        f" ({frame.f_code.co_filename}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_of(str(frame.f_globals.get("__name__")), module)
    ]
    return message + (theirs[-1] if theirs else "")


def _is_of(name: str, module: str) -> bool:
    top = module.partition(".")[0]
    return name.startswith(PREFIX) or (bool(top) and name.partition(".")[0] == top)


class _Finder(MetaPathFinder):
    """Finds the modules of folders, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what imports a module of a folder."""
        if path is None or not fullname.startswith(PREFIX):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Runs a file whose imports look into its folder first; nothing is written beside it."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the file's code as it is now."""
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        """Run the file in a module."""
        file = Path(self.path)
        setattr(module, _STAMP, _stamp(file))
        # Python takes the function that ``import`` calls from here, also when it is called late.
        importing = {**vars(builtins), "__import__": _import_for(_homes(file), _around(file))}
        module.__dict__["__builtins__"] = importing
        super().exec_module(module)


def _import_for(homes: Sequence[Path], around: Sequence[Path]) -> Callable[..., Any]:
    """Return ``__import__`` for a file.

    Args:
        homes: folders that come before what is installed, as a script's does.
        around: folders that come after it.
    """

    def find(
        name: str,
        globals: Any = None,
        locals: Any = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        folder = None if level else _folder_of(name.partition(".")[0], homes, around)
        if folder is None:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        package = _package(folder)
        if fromlist:
            return builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)
        importlib.import_module(f"{package}.{name}")
        return sys.modules[f"{package}.{name.partition('.')[0]}"]

    return find


def _folder_of(top: str, homes: Sequence[Path], around: Sequence[Path]) -> Path | None:
    """Return the folder that a module is to be taken from; None if it is an installed one."""
    if top in sys.stdlib_module_names or top.startswith(PREFIX):
        return None
    installed = _installed(top)
    for folder in (*homes, *around):
        found = _spec_in(folder, top)
        if found is None or (installed is not None and folder not in homes):
            continue
        if installed is None:
            return folder
        # A folder without __init__.py comes last. What is on sys.path is the same for everyone.
        if found.origin is not None and found.origin != installed.origin:
            return folder
    return None


def _installed(top: str) -> ModuleSpec | None:
    """Return what an import of a module would find without any of this."""
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: it is loaded, and not from a file
        return getattr(sys.modules.get(top), "__spec__", None)


def _spec_in(folder: Path, top: str) -> ModuleSpec | None:
    """Return a module or package of that name in a folder."""
    spec = PathFinder.find_spec(top, [str(folder)])
    if spec is not None and spec.origin is None and not any((folder / top).glob("**/*.py")):
        return None  # a folder of other things
    return spec


def _top(folder: Path) -> Path:
    """Return the folder that holds the outermost package which a folder belongs to."""
    while (folder / "__init__.py").is_file() and "." not in folder.name and folder.name:
        folder = folder.parent
    return folder


def _homes(file: Path) -> tuple[Path, ...]:
    return tuple(dict.fromkeys((file.parent, _top(file.parent))))


def _around(file: Path) -> tuple[Path, ...]:
    return (_top(file.parent).parent, Path.cwd())


def _package(folder: Path) -> str:
    """Return the name of a folder's package, made if need be."""
    name = _name_of(folder)
    if name not in sys.modules:
        package = ModuleType(name, f"The folder {folder}.")
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before what would find them as plain files
    return name


def _name_of(folder: Path) -> str:
    return PREFIX + hashlib.sha256(str(folder).encode()).hexdigest()[:10]


def _forget_if_changed(folder: Path) -> None:
    """Let a folder's modules be run anew if one of their files is not what was run."""
    name = _name_of(folder)
    own = {key: m for key, m in sys.modules.items() if key.startswith(f"{name}.")}
    stamped = {key: m for key, m in own.items() if hasattr(m, _STAMP)}
    if any(getattr(m, _STAMP) != _stamp(Path(str(m.__file__))) for m in stamped.values()):
        for key in own:
            del sys.modules[key]


def _stamp(file: Path) -> tuple[int, int] | None:
    """Return what tells a file's contents from others; None if there is no file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
