"""Modules of a checkout, imported as they are, without the environments and logs that they name."""

import importlib
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

# What peers import at their top and their updates never use.
LEFT_OUT = ("d4rl", "dateutil", "gtimer", "gym", "pyrallis", "torchvision", "wandb")


class LeftOut(ModuleType):
    """Stands in for a module: all that it has is this one class, under any name."""

    class Anything:
        """A base class, an annotation, or a decorator that does nothing."""

        def __init__(self, *_, **__):
            pass

        def __call__(self, function):
            return function

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.Anything


class LeftOutFinder:
    """Finds a LeftOut for the names in LEFT_OUT and all below them, be they installed or not."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if name.split(".")[0] in LEFT_OUT:
            return importlib.machinery.ModuleSpec(name, LeftOutFinder, is_package=True)
        return None

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> LeftOut:
        return LeftOut(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        pass


def import_from(folder: Path, *names: str) -> list[ModuleType]:
    """Modules of a checkout, with stand-ins for what is left out.

    Afterwards imports find none of either: peers have modules of the same names, such as utils.
    """
    aside = {}
    for name in list(sys.modules):
        if name.split(".")[0] in LEFT_OUT or (folder / f"{name}.py").exists():
            aside[name] = sys.modules.pop(name)
    before = set(sys.modules)
    sys.meta_path.insert(0, LeftOutFinder)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(LeftOutFinder)
        for name in set(sys.modules) - before:
            path = getattr(sys.modules[name], "__file__", None)
            is_theirs = path is not None and Path(path).is_relative_to(folder)
            if is_theirs or isinstance(sys.modules[name], LeftOut):
                del sys.modules[name]
        sys.modules.update(aside)
