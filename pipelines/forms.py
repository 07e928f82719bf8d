"""What all forms share: which dataset, and where its work runs."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from infra.ray_session import Embedded, Existing, Job, RayJob, RayTarget

SECRET = re.compile(r"(?<=://)[^/\s@]*:[^/\s@]*@")
"""User and password in an address."""


class Form(BaseModel):
    """What all forms share: unknown fields are errors, and so are numbers that JSON cannot hold."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: object) -> object:
        """An unknown one is an error that lists those there are."""
        if isinstance(value, dict) and (unknown := value.keys() - cls.model_fields.keys()):
            known = ", ".join(cls.model_fields)
            raise ValueError(f"there is no field {min(unknown, key=str)!r}; there are {known}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_secrets(cls, value: object) -> object:
        """Parameters are stored and shown, and so is what is made of them."""
        if SECRET.search(str(value)):
            raise ValueError(
                "an address must not hold a password, since it is stored and shown: credentials "
                "come from the environment (AWS_* for S3); download what else needs one"
            )
        return value


class Where(Form):
    """Which dataset."""

    root: str = Field(
        "data/dataset", min_length=1, description="Dataset: a folder, or s3://bucket/prefix."
    )

    @property
    def dataset(self) -> str:
        """What runs are named after: the end of the address, of plain characters."""
        return re.sub(r"[^\w.-]+", "-", PurePosixPath(self.root).name)[:40].strip("-") or "dataset"


class Compute(Form):
    """Where the work of a stage runs."""

    ray: RayTarget = Field(
        Embedded(),
        description="'embedded' (on this machine), a cluster's address, 'auto', the http:// "
        "address of a dashboard to run as a job there, or 'rayjob' for a cluster on Kubernetes.",
    )
    workers: int | None = Field(
        None, ge=0, description="Worker processes; none: one for each core or GPU. 0: without Ray."
    )
    gpus: float | None = Field(
        None, ge=0, description="GPUs that each worker occupies, may be a fraction; none: one, or "
        "an equal share, where this machine has any, none of a cluster's. 0: it sees none."
    )

    @field_validator("ray", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        """On the command line an address, or a word, stands for the whole."""
        if not isinstance(value, str):
            return value
        if value.startswith(("http://", "https://")):
            return Job(address=value)
        words = {"embedded": Embedded(), "rayjob": RayJob()}
        return words.get(value) or Existing(address=value)
