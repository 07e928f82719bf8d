"""Fields of forms that name something: what there is to choose from, and what is refused.

Choices are asked for when a form is made, so that those of installed packages count.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field


def _known_labeler(name: str) -> str:
    from models.labelers import kinds

    if name not in kinds():
        raise ValueError(f"no such labeler; there are {', '.join(map(repr, kinds()))}")
    return name


def _known_dense(name: str) -> str:
    from tasks.tokenizer_recipes import recipe_names

    if name not in recipe_names():
        raise ValueError(f"no such modality; there are {', '.join(map(repr, recipe_names()))}")
    return name


def _offer_labelers(schema: dict[str, Any]) -> None:
    from models.labelers import kinds

    schema["enum"] = kinds()


def _offer_dense(schema: dict[str, Any]) -> None:
    from tasks.tokenizer_recipes import recipe_names

    schema["enum"] = recipe_names()


def _host(name: str) -> str:
    if "/" in name:
        raise ValueError("that is an address; write its host, or host:port, alone")
    return name


HostName = Annotated[str, AfterValidator(_host)]
LabelerName = Annotated[
    str, AfterValidator(_known_labeler), Field(json_schema_extra=_offer_labelers)
]
"""A kind of labeler, of this project or of an installed package."""
DenseName = Annotated[str, AfterValidator(_known_dense), Field(json_schema_extra=_offer_dense)]
"""A modality with a recipe for its tokenizer, of this project or of an installed package."""


def _known_accelerator(name: str) -> str:
    if name:
        from ray.util import accelerators

        choices = sorted(value for key, value in vars(accelerators).items() if key.isupper())
        if name not in choices:
            raise ValueError(f"Ray knows no such accelerator; there are {', '.join(choices)}")
    return name


Accelerator = Annotated[str, AfterValidator(_known_accelerator)]
"""A type of GPU as Ray names it; empty: any."""
