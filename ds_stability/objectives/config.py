"""The `objective` key of the stability block: one section per objective, told apart by `name`. No torch."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ds_stability.config_describe import Section
from ds_stability.config_errors import InvalidValue
from ds_stability.errors import StabilityConfigError
from ds_stability.safe_read import parse_json

#: Objectives that need the tokens before, a reference model or generated text: the engine prepares each micro-batch.
PREPARED = ("unlikelihood_token", "unlikelihood_sequence", "reverse_kl")

_Tokens = Annotated[int, Field(ge=1, le=10**6)]
_Gamma = Annotated[float, Field(ge=0, le=20)]


def _reference(value: str | None) -> str | None:
    if value is None or not value or "\0" in value:
        raise InvalidValue("", value, "the folder or hub name of a causal LM, as this objective needs a reference model")
    return value


def _budget(value: int | None) -> int | None:
    if value is None:
        raise InvalidValue("", None, "an integer from 1 to 1000000, the tokens to generate per text, as the sequence level "
                           "needs a generation budget")  # fmt: skip
    return value


class CrossEntropy(Section):
    name: Literal["cross_entropy"] = "cross_entropy"


class LabelSmoothing(Section):
    name: Literal["label_smoothing"]
    smoothing: float = Field(0.1, ge=0, le=1, description="share e of the target that is spread over the vocabulary")


class Focal(Section):
    name: Literal["focal"]
    gamma: _Gamma = Field(2.0, description="exponent of 1 - p; 0 = cross-entropy")


class Tofu(Section):
    name: Literal["tofu"]
    gamma: _Gamma = Field(3.0, description="exponent of the focal factor, which carries no gradient")
    beta: float = Field(0.8, ge=0.01, le=10, description="temperature of the log-probability that carries the gradient")


class EntropyRegularized(Section):
    name: Literal["entropy_regularized"]
    coefficient: float = Field(0.1, ge=0, le=100, description="weight of the entropy that is taken from the loss")


class Gem(Section):
    name: Literal["gem"]
    beta: float = Field(0.7, ge=0.01, le=10, description="temperature of the auxiliary distribution q")
    h: Literal["linear", "logsigmoid"] = Field("linear", description="the function h, which weighs the differences")


class UnlikelihoodToken(Section):
    name: Literal["unlikelihood_token"]
    alpha: float = Field(1.0, ge=0, le=1000, description="weight of the unlikelihood of the document's earlier tokens")


class UnlikelihoodSequence(Section):
    name: Literal["unlikelihood_sequence"]
    max_new_tokens: Annotated[int | None, Field(ge=1, le=10**6), AfterValidator(_budget)] = Field(
        None, validate_default=True, description="generation budget: tokens generated per text; must be given",
        json_schema_extra={"allowed": "an integer from 1 to 1000000"},
    )  # fmt: skip
    prefix_tokens: _Tokens = Field(50, description="tokens of each training text that generation goes on from")
    n: Annotated[int, Field(ge=1, le=1000)] = Field(4, description="length of the n-grams whose repetition is penalized")
    probability: float = Field(0.5, gt=0, le=1, description="share of optimizer steps on generated text; the others are plain")


class ReverseKL(Section):
    name: Literal["reverse_kl"]
    reference: Annotated[str | None, AfterValidator(_reference)] = Field(
        None, validate_default=True, description="frozen reference model: folder or hub name; must be given",
        json_schema_extra={"allowed": "a folder or hub name of a causal LM"},
    )  # fmt: skip
    coefficient: float = Field(0.1, gt=0, le=1000, description="weight of KL(model || reference)")
    cross_entropy: float = Field(1.0, ge=0, le=1000, description="weight of the cross-entropy beside it; 0 = KL alone")


Objectives = (CrossEntropy | LabelSmoothing | Focal | Tofu | EntropyRegularized | Gem | UnlikelihoodToken
              | UnlikelihoodSequence | ReverseKL)  # fmt: skip


def parse_objective_flag(text: str) -> Any:
    """The section that --stability_objective stands for: JSON as it is, a bare word as the name.

    Raises:
        StabilityConfigError: it begins as JSON does, and is none.
    """
    if not text.lstrip().startswith("{"):
        return {"name": text}
    try:
        return parse_json(text)
    except ValueError as error:
        raise StabilityConfigError(f'--stability_objective {text}: is no JSON ({error}); give a name, or {{"name": ...}}') from None
