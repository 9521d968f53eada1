"""Replaces another project's functions by ours, all in a table or none, and restores them. trl, verl and openrlhf each
have one `Patch`."""

import functools
import importlib
import importlib.metadata
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

_ABSENT = object()
_lock = threading.RLock()


def _new_lock() -> None:
    """After a fork, a thread that exists only in the parent may hold the old lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


class PatchError(RuntimeError):
    """The installed version of the project is not one that the table was written for. Nothing was replaced."""


@dataclass(frozen=True)
class Replacement:
    """A row of the table.

    target: where the function is defined, "package.module:function" or "package.module:Class.method".
    ours: the function that replaces it, with the same parameters.
    signature: the parameters that the installed function must have, with defaults and without annotations:
        "(logits, index, temperature=1.0)".
    signature_of: the name in the same module that has this signature, if it is not the target. For an
        autograd.Function whose apply is replaced, it is the forward.
    versions: the versions of the package that this row is for; all by default.
    """

    target: str
    ours: Callable
    signature: str
    signature_of: str | None = None
    versions: str = ""


@dataclass
class _Found:
    """The installed function of a row."""

    row: Replacement
    owner: Any
    """The module or class that has it."""
    name: str
    original: Any
    """The function as callers get it."""
    held: Any
    """What stands in the owner's own namespace, such as a staticmethod; _ABSENT if the owner inherits the function."""
    ours: Any


class Patch:
    """The table of one package, and whether its replacements are in force.

    A function is replaced where it is defined, and wherever a module of its package holds the same object, under any
    name or in a dict of the module (a registry). It does not matter whether a module is imported before or after.
    Modules outside the package that imported the function by name keep the original.
    """

    def __init__(self, package: str, versions: str, rows: tuple[Replacement, ...]):
        self.package = package
        self.versions = versions
        self.rows = rows
        self._found: list[_Found] = []
        self._reasons: dict[str, str] = {}
        self._theirs: set[tuple[int, Any]] = set()
        self._kept = False
        self._blocks = 0

    def patch(self, verbose: bool = False) -> None:
        """Replaces every function of the table until `unpatch`. A second call changes nothing.

        The installed version and every signature are checked first. A row is left out if its module needs another
        package that is not installed, since nothing can have imported that module.

        Args:
            verbose: print a table of what was replaced.

        Raises:
            ImportError: the package, or something that all of its modules need, is not installed.
            PatchError: its version or a signature differs from the table's. Nothing has changed.
        """
        with _lock:
            self._begin()
            self._kept = True
            if verbose:
                print(self.table())

    def unpatch(self) -> None:
        """Undoes `patch`. Open blocks of `patched` keep the functions replaced until they end."""
        with _lock:
            self._kept = False
            self._end()

    @contextmanager
    def patched(self, verbose: bool = False) -> Iterator[None]:
        """Replaces the functions for a with block. Afterwards they stay replaced only if `patch` was called."""
        with _lock:
            self._begin()
            self._blocks += 1
        try:
            if verbose:
                print(self.table())
            yield
        finally:
            with _lock:
                self._blocks -= 1
                self._end()

    def original(self, target: str) -> Any:
        """The package's own function for a target of the table, whether it is replaced at present or not."""
        with _lock:
            for found in self._found:
                if found.row.target == target:
                    return found.original
            module, _, path = target.partition(":")
            return getattr(*_owner(importlib.import_module(module), path))

    def table(self) -> str:
        """Text that lists what is replaced at present, and what could not be replaced and why."""
        with _lock:
            lines = [(found.row.target, _name(found.row.ours)) for found in self._found]
            lines += [(target, f"left as it is: {reason}") for target, reason in self._reasons.items()]
            width = max((len(target) for target, _ in lines), default=0)
            version = importlib.metadata.version(self.package)
            heading = f"{self.package} {version}: {len(self._found)} functions replaced by rlkernels"
            return "\n".join([heading, *(f"  {target:{width}}  {text}" for target, text in lines)])

    def _begin(self) -> None:
        if self._found:
            return
        found = self._check()
        ours = {id(each.ours) for each in found}
        self._theirs = {(id(holder), key) for holder, key, value in self._held() if id(value) in ours}
        try:
            for each in found:
                setattr(each.owner, each.name, each.ours)
            self._exchange({id(each.held): each.ours for each in found if each.held is not _ABSENT})
        except BaseException:
            self._restore(found)
            raise
        self._found = found

    def _end(self) -> None:
        if self._found and not self._kept and self._blocks == 0:
            self._restore(self._found)
            self._found, self._reasons = [], {}

    def _restore(self, found: list[_Found]) -> None:
        for each in found:
            if each.held is not _ABSENT:
                setattr(each.owner, each.name, each.held)
            elif each.name in vars(each.owner):
                delattr(each.owner, each.name)
        self._exchange({id(each.ours): each.held for each in found if each.held is not _ABSENT})

    def _check(self) -> list[_Found]:
        """Finds the function of every row for the installed version. Raises PatchError that names all that differ."""
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise ModuleNotFoundError(f"{self.package} is not installed", name=self.package) from None
        if version not in SpecifierSet(self.versions, prereleases=True):
            raise PatchError(
                f"{self.package} {version} is installed, and rlkernels knows {self.package}{self.versions}; "
                "nothing was replaced"
            )
        found: list[_Found] = []
        wrong: list[str] = []
        self._reasons = {}
        missing = None
        for row in self.rows:
            if version not in SpecifierSet(row.versions, prereleases=True):
                continue
            module_name, _, path = row.target.partition(":")
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name is None or error.name.split(".")[0] == self.package:
                    wrong.append(f"{row.target} is not there ({error})")
                else:
                    missing = error
                    self._reasons[row.target] = f"{error.name} is not installed"
                continue
            try:
                owner, name = _owner(module, path)
                signature = _signature(*_owner(module, row.signature_of or path))
            except AttributeError as error:
                wrong.append(f"{row.target} is not there ({error})")
                continue
            if signature != row.signature:
                where = f"{module_name}:{row.signature_of or path}"
                wrong.append(f"{where} has the signature {signature}, where {row.signature} was expected")
                continue
            held = vars(owner).get(name, _ABSENT)
            # Only a plain function in a class gets the instance; for anything else ours must be a staticmethod.
            static = isinstance(owner, type) and not isinstance(inspect.getattr_static(owner, name), FunctionType)
            ours = staticmethod(row.ours) if static else row.ours
            if any(each.ours is ours for each in found):
                ours = _another(ours)
            found.append(_Found(row, owner, name, getattr(owner, name), held, ours))
        if wrong:
            raise PatchError(
                f"{self.package} {version} is not as rlkernels knows it, and nothing was replaced: {'; '.join(wrong)}"
            )
        if not found and missing is not None:
            raise missing
        return found

    def _exchange(self, others: dict[int, Any]) -> None:
        """Replaces each held value by others[id(value)], except where a function of ours stood before patching."""
        for holder, key, value in self._held():
            if id(value) in others and (id(holder), key) not in self._theirs:
                holder[key] = others[id(value)]

    def _held(self) -> Iterator[tuple[dict, Any, Any]]:
        """(dict, key, value) for the namespace of every module of the package and for every dict in one."""
        for name, module in list(sys.modules.items()):
            if not isinstance(module, ModuleType) or name.split(".")[0] != self.package:
                continue
            for holder in (vars(module), *(value for value in list(vars(module).values()) if type(value) is dict)):
                for key, value in list(holder.items()):
                    yield holder, key, value


def _another(function: Callable) -> Callable:
    """A wrapper with its own identity, so that two rows with the same function can be told apart when restoring."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


def _owner(module: ModuleType, path: str) -> tuple[Any, str]:
    """(module or class, name) of what `path` names. Raises AttributeError if it is not there."""
    *classes, name = path.split(".")
    owner: Any = module
    for each in classes:
        owner = getattr(owner, each)
    getattr(owner, name)
    return owner, name


def _signature(owner: Any, name: str) -> str:
    parameters = inspect.signature(getattr(owner, name)).parameters.values()
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def _name(function: Callable) -> str:
    return f"{function.__module__}.{function.__qualname__}"
