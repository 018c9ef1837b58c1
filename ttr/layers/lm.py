"""LM: a small language model whose layers are any mixture of declarations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..choice import PathChoice
from ..kernels.eager import known
from ..spec import Spec
from .block import EPS, Block
from .causal import CausalLayer
from .compose import Composition, Layered
from .state import LMState


class LM(nn.Module):
    """Token embedding, one Block per entry of `layers`, a final RMSNorm, and the head.

    layers: one spec per block; hybrids mix them, ["gated_deltanet", "softmax"] * 2. layer_overrides go to every mixer.
    init_std: embeddings and linear maps start from N(0, init_std^2), those that end a residual branch from a
    1/sqrt(2 len(layers)) of it (GPT-2); null leaves the modules' own initialisation. Everything else starts as
    published.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        layers: Sequence[Layered],
        *,
        mlp: Literal["swiglu"] | None = None,
        mlp_ratio: float = 8 / 3,
        tie_embeddings: bool = True,
        init_std: float | None = 0.02,
        path: PathChoice = "auto",
        **layer_overrides: Any,
    ):
        super().__init__()
        if isinstance(layers, (str, Path, Mapping, Spec, Composition)) or not isinstance(layers, Sequence) or not layers:
            raise ValueError(f"layers={layers!r}: expected a sequence of specs, one per block, e.g. ['kda', 'softmax']")
        self.init_std, self.tied = init_std, tie_embeddings
        self.embedding = nn.Embedding(vocab_size, d_model)
        options = {"path": path, **layer_overrides}
        self.blocks = nn.ModuleList(
            Block(d_model, spec, mlp=mlp, mlp_ratio=mlp_ratio, layer_idx=i, n_layers=len(layers), **options)
            for i, spec in enumerate(layers)
        )
        self.norm = nn.RMSNorm(d_model, eps=EPS)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self._tie()
        self._reset_linear()

    @property
    def specs(self) -> list[Spec | Composition]:
        return [block.mixer.spec for block in self.blocks]  # type: ignore[union-attr]

    def reset_parameters(self) -> None:
        """Initialise everything again; also after `to_empty`, which unties the embedding from the head."""
        self._tie()
        for child in (self.embedding, *self.blocks, self.norm, self.head):
            child.reset_parameters()  # type: ignore[operator]
        self._reset_linear()

    def _tie(self) -> None:
        if self.tied:
            self.head.weight = self.embedding.weight

    def _reset_linear(self) -> None:
        if self.init_std is None:
            return
        ends = {id(m) for b in self.blocks for m in (b.mixer.o_proj, b.mlp and b.mlp.down)}  # type: ignore[union-attr]
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not (module is self.head and self.tied):
                shrink = (2 * len(self.blocks)) ** -0.5 if id(module) in ends else 1.0
                nn.init.normal_(module.weight, std=self.init_std * shrink)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are no matrices of a linear map; the embedding is one."""
        own = {f"{name}." for name, m in self.named_modules() if isinstance(m, CausalLayer)}
        mixers = {p + n for p in own for n in self.get_submodule(p[:-1]).no_weight_decay()}  # type: ignore[operator]
        norms = {f"{name}.weight" for name, m in self.named_modules() if isinstance(m, nn.RMSNorm)}
        return mixers | norms

    def hidden(self, tokens: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """tokens: [B, T] int64 -> [B, T, d_model] behind the final norm."""
        x = self.embedding(self._check_tokens(tokens, "[B, T]"))
        for block in self.blocks:
            x = block(x, mask=mask, cu_seqlens=cu_seqlens)
        return self.norm(x)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """tokens: [B, T] int64 -> logits [B, T, vocab_size]; mask, cu_seqlens as in Mixer."""
        return self.head(self.hidden(tokens, mask, cu_seqlens))

    def prefill(
        self, tokens: Tensor, state: LMState | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        """`forward` from `state`, and the state after the last token."""
        x, states = self.embedding(self._check_tokens(tokens, "[B, T]")), []
        for i, block in enumerate(self.blocks):
            x, new = block.prefill(x, None if state is None else state.layers[i], mask=mask, cu_seqlens=cu_seqlens)  # type: ignore[operator]
            states.append(new)
        return self.head(self.norm(x)), LMState(tuple(states))

    def step(self, token: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """token: [B] int64 -> logits [B, vocab_size] and the next state."""
        x, states = self.embedding(self._check_tokens(token, "[B]")), []
        for block, old in zip(self.blocks, state.layers, strict=True):
            x, new = block.step(x, old)  # type: ignore[operator]
            states.append(new)
        return self.head(self.norm(x)), LMState(tuple(states))

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LMState:
        return LMState(tuple(b.init_state(batch_size, device=device, dtype=dtype) for b in self.blocks))  # type: ignore[operator]

    def _check_tokens(self, tokens: Tensor, shape: str) -> Tensor:
        if tokens.is_floating_point() or tokens.ndim != shape.count(",") + 1:
            raise ValueError(f"tokens: got {tokens.dtype} of shape {list(tokens.shape)}, expected int64 {shape}")
        if known(tokens) and tokens.numel():
            least, most = tokens.min().item(), tokens.max().item()
            if least < 0 or most >= self.embedding.num_embeddings:
                raise ValueError(f"tokens: got {least} to {most}, expected 0 to {self.embedding.num_embeddings - 1} (vocab_size - 1)")
        return tokens
