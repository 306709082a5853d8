"""A method from outside the package: it trains the biases and norms that the model has. Used by the contract test."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftcli.methods.base import Caps, MethodConfig
from peftcli.methods.kinds import Select


class ToyConfig(MethodConfig):
    name: Literal["toy"] = Field("toy", description="`toy`")
    pattern: str = Field("norm", description="Text in the names of the parameters that move.")


class Toy(Select[ToyConfig]):
    Config = ToyConfig
    paper = "https://example.org"
    summary = "Norms move."
    caps = Caps(mergeable=True, quantized_base=False, identity_at_init=True, whole_model=True)

    def trainable(self, name: str) -> bool:
        return self.config.pattern in name
