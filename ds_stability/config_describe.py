"""What the keys of a pydantic model may hold, in words; and its validation errors as one line in those words."""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from ds_stability.config_errors import did_you_mean, key_path, show_value

_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a non-empty string"}
_TYPE_NAMES[type(None)] = "null"
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Section(BaseModel):
    """A part of a config with keys of its own."""

    model_config = STRICT


@dataclass(frozen=True)
class KeyInfo:
    """One key: dotted path, default as a JSON value, what is allowed, what it means, whether it holds other keys.

    A key that only one kind of a section has is at "section(kind).key".
    """

    path: str
    default: Any
    allowed: str
    meaning: str
    section: bool


def describe_model(model: type[BaseModel], prefix: str = "") -> Iterator[KeyInfo]:
    """Every key of `model` and of the models in it, in order of declaration."""
    for name, field in model.model_fields.items():
        kinds = variants(field)
        children = {} if kinds else _children(field.annotation)
        default = field.default.model_dump(mode="json") if isinstance(field.default, BaseModel) else field.default
        yield KeyInfo(prefix + name, default, _allowed(field), field.description or "", bool(children or kinds))
        if kinds:
            names = " or ".join(show_value(kind) for kind in kinds)
            yield KeyInfo(f"{prefix}{name}.{field.discriminator}", default[field.discriminator], names, "which kind it is", False)
        for kind, child in kinds.items():
            for info in describe_model(child, f"{prefix}{name}({kind})."):
                if not info.path.endswith(f".{field.discriminator}"):
                    yield info
        for path, child in children.items():
            yield from describe_model(child, f"{prefix}{name}{path}.")


def variants(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """{name: section} of a key that holds one of several kinds of section, told apart by the field's discriminator."""
    if not isinstance(field.discriminator, str):
        return {}
    models = typing.get_args(field.annotation)
    return {typing.get_args(model.model_fields[field.discriminator].annotation)[0]: model for model in models}


def _children(annotation: Any) -> dict[str, type[BaseModel]]:
    """The models below a key: {"": model} for a section, {".name": model} for a typed dict of sections."""
    for arg in typing.get_args(annotation) or (annotation,):
        if _is_model(arg):
            return {"": arg}
        if is_typeddict(arg):
            return {f".{name}": child for name, child in typing.get_type_hints(arg).items()}
    return {}


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _allowed(field: FieldInfo) -> str:
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["allowed"])
    return _allowed_type(field.annotation, list(field.metadata))


def _allowed_type(annotation: Any, bounds: list[Any]) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner = [bound for extra in args[1:] if isinstance(extra, FieldInfo) for bound in extra.metadata]
        return _allowed_type(args[0], [*bounds, *inner])
    if origin in (typing.Union, types.UnionType):
        if all(_is_model(arg) for arg in args):
            return "an object with a name, and the keys of that kind"
        return ", or ".join(_allowed_type(arg, bounds) for arg in args)
    if origin is Literal:
        return " or ".join(show_value(arg) for arg in args)
    if _is_model(annotation):
        return "an object with any of the keys " + ", ".join(annotation.model_fields)
    if is_typeddict(annotation):
        return "an object with any of the keys " + ", ".join(typing.get_type_hints(annotation))
    return _TYPE_NAMES[annotation] + (_bounds_text(bounds) if annotation in (int, float) else "")


def _bounds_text(bounds: list[Any]) -> str:
    low = high = ""
    for bound in bounds:
        match bound:
            case Ge(ge=value):
                low = f"from {value}"
            case Gt(gt=value):
                low = f"above {value}"
            case Le(le=value):
                high = f"to {value}" if low.startswith("from") else f"up to {value}"
            case Lt(lt=value):
                high = f"below {value}"
    separator = " and " if high and not high.startswith("to") else " "
    return f" {low}{separator}{high}".rstrip()


def translate(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """One line for a failed validation: key path, value given, what is allowed; how many more problems there are."""
    problems = error.errors(include_url=False)
    # A misspelled key first: it is often the cause of the others.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _problem_line(problems[0], model, source) + more


def _problem_line(problem: Any, model: type[BaseModel], source: str) -> str:
    loc, given = problem["loc"], problem["input"]
    known = {info.path: info for info in describe_model(model)}
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        loc = (*loc, problem["ctx"]["discriminator"].strip("'"))
        given = problem["ctx"].get("tag")
    loc, dotted = _without_kinds(loc, model)
    path = key_path(loc, source)
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown_key_line(path, _without_kinds(problem["loc"][:-1], model)[1], str(loc[-1]), given, known)
    if problem["type"] == "value_error":  # an InvalidValue of ours, which knows more than pydantic does
        cause = problem["ctx"]["error"]
        path, given, allowed = path + cause.where, cause.given, cause.allowed
    elif dotted in known:
        allowed = known[dotted].allowed
    else:  # the whole block, or a family
        allowed = "an object with any of the keys " + ", ".join(_keys_below(dotted, known))
    if isinstance(given, str) and given == "auto" and source.startswith("stability"):
        return f'{path}: "auto" is not allowed inside the stability block, where nothing fills it in; must be {allowed}'
    return f"{path}: {show_value(given)} is not allowed; must be {allowed}"


def _without_kinds(loc: tuple, model: type[BaseModel]) -> tuple[tuple, str]:
    """(what the user wrote, the path in `describe_model`) of an error's place, in which pydantic names a section's kind."""
    field = model.model_fields.get(loc[0]) if loc else None
    kinds = variants(field) if field is not None else {}
    if len(loc) > 1 and loc[1] in kinds:
        return (loc[0], *loc[2:]), ".".join([f"{loc[0]}({loc[1]})", *map(str, loc[2:])])
    return loc, ".".join(str(part) for part in loc)


def _keys_below(section: str, known: dict[str, KeyInfo]) -> list[str]:
    """Names of the keys directly in `section` ("" is the whole block); of `stabilizers`, the families."""
    prefix = section + "." if section else ""
    names = (path.removeprefix(prefix).partition(".")[0].partition("(")[0] for path in known if path.startswith(prefix))
    return list(dict.fromkeys([*(["name"] if "(" in section else []), *names]))


def _unknown_key_line(path: str, section: str, key: str, given: object, known: dict[str, KeyInfo]) -> str:
    siblings = _keys_below(section, known)
    guess = did_you_mean(key, siblings)
    if guess is None:  # the right key in the wrong place
        leaves = {info.path.rpartition(".")[2]: info.path for info in reversed(known.values()) if not info.section}
        leaf = did_you_mean(key, leaves, cutoff=0.85)
        guess = leaves[leaf] if leaf else None
    hint = f'did you mean "{guess}"? ' if guess else ""
    return f"{path}: unknown key (value {show_value(given)}); {hint}allowed here: {', '.join(siblings)}"
