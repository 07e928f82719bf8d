"""Command line options out of a pydantic form: one definition for the UI and the terminal."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipelines.forms import SECRET

_SCALARS = (str, int, float, bool)


@dataclass(frozen=True)
class Spelled:
    """Put beside the type of a field whose option is called or written in a way of its own."""

    flag: str
    """Such as "--from"."""
    read: Callable[[str, str], Any] | None = None
    """(flag, text) -> an item of the field's list, or a pair of its dict, where the option is
    repeated for each of them."""


def parameters(form: type[BaseModel]) -> list[inspect.Parameter]:
    """One keyword for each field: scalars as they are, lists comma separated, others as JSON, or
    as they are `Spelled`.

    An option that is not given is None, so that the form's own default counts.
    """
    return [_parameter(name, field) for name, field in form.model_fields.items()]


def collect(form: type[BaseModel], given: dict[str, Any]) -> dict[str, Any]:
    """The values for the form out of the options that were given.

    Raises:
        ValueError: An option that takes JSON holds something else.
    """
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        kind, spelled = _bare(form.model_fields[name]), _spelled(form.model_fields[name])
        if spelled and spelled.read:
            items = [spelled.read(spelled.flag, item) for item in value]
            value = items if get_origin(kind) is list else dict(items)
        elif get_origin(kind) is list:
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif isinstance(value, str) and (get_origin(kind) is dict or value.startswith("{")):
            value = _json(name, form.model_fields[name], value)
        values[name] = value
    return values


def _json(name: str, field: FieldInfo, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        shown = re.search(r"\{.*\}", field.description or "")  # the example of its help
        such = f", such as '{shown[0]}'" if shown else ""
        raise ValueError(f"--{_dashed(name)} takes JSON{such}: {text!r} is none: {error}") from None


def sentence(error: Any) -> str:
    """One validation error of pydantic as a sentence that names the option."""
    where = ".".join(str(part) for part in error["loc"]) or "options"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"--{_dashed(where)} is required"
    text = f"{where}={SECRET.sub('...@', repr(error['input']))}: {message}"
    return text[:1].lower() + text[1:]


def pair(flag: str, item: str) -> tuple[str, str]:
    """"depth=near.png" as its two sides. Raises ValueError for anything else."""
    name, equals, value = item.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"{flag} {item!r} is not of the form modality=file-or-text")
    return name.strip(), value


def weighted(flag: str, item: str) -> dict[str, Any]:
    """"-2*caption=at night" as a weight and a condition. Raises ValueError for anything else."""
    found = re.match(r"\s*([-+]?\d*\.?\d+)\s*\*(.+)", item, re.DOTALL)
    if not found:
        raise ValueError(f"{flag} {item!r} is not of the form weight*modality=file-or-text")
    return {"weight": float(found[1]), "conditions": dict([pair(flag, found[2])])}


def fields(flag: str, item: str) -> tuple[str, dict[str, str]]:
    """"rgb:steps=16,top-p=0.9" as a name and its settings. Raises ValueError for anything else."""
    name, colon, rest = item.partition(":")
    parts = [part.partition("=") for part in rest.split(",")]
    if not colon or not name.strip() or not all(equals for _, equals, _ in parts):
        raise ValueError(f"{flag} {item!r} is not of the form target:setting=value,setting=value")
    return name.strip(), {key.strip().replace("-", "_"): value.strip() for key, _, value in parts}


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind, spelled = _bare(field), _spelled(field)
    shown: Any = kind
    note = field.description or ""
    if spelled and spelled.read:
        note += " Repeat it for several."
        shown = list[str]
    elif get_origin(kind) is list:
        choices = get_args(get_args(kind)[0]) if get_origin(get_args(kind)[0]) is Literal else ()
        note += f" Comma separated{': ' + ', '.join(choices) if choices else ''}."
        shown = str
    elif _is_json(kind):
        shown = str
    required = field.is_required()
    if not required:
        note += f" [dim]\\[default: {_text(field.default)}][/dim]"
    flags = [spelled.flag if spelled else f"--{_dashed(name)}"]
    if kind is bool:
        flags = [f"--{_dashed(name)}/--no-{_dashed(name)}"]
    option = typer.Option(*flags, help=note, show_default=False)
    annotation = shown if required else _maybe(shown)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[annotation, option],
    )


def _maybe(kind: Any) -> Any:
    return typing.Optional[kind]  # noqa: UP045 - `Literal | None` is no type for typer


def _spelled(field: FieldInfo) -> Spelled | None:
    return next((mark for mark in field.metadata if isinstance(mark, Spelled)), None)


def _bare(field: FieldInfo) -> Any:
    """The annotation without an optional None."""
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        rest = [part for part in get_args(kind) if part is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind


def _is_json(kind: Any) -> bool:
    return kind not in _SCALARS and get_origin(kind) is not Literal


def _text(default: Any) -> str:
    if default is None or default is PydanticUndefined or default == "":
        return "none"
    if isinstance(default, BaseModel):
        return str(getattr(default, "kind", default))
    if isinstance(default, list | tuple):
        return ",".join(str(item) for item in default) or "none"
    if default == {}:
        return "none"
    return str(default)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


