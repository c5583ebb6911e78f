"""A model as the steps want it: its weights in a backend's layout, and its sizes.

``run_layers`` is the only way through the layers: early exit, the rest, and the full depth are one function,
and live in the backend (reference.run_layers says what it does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from layerskip_kernels import ops
from layerskip_kernels.config import AUTO, MOST_SPECULATIONS, NUM_SPECULATIONS, GenerationConfig
from layerskip_kernels.model import quantise
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.defaults import DraftDefaults
from layerskip_kernels.model.exit_adapter import (
    HEAD,
    HEAD_IDS,
    ExitAdapter,
    adapter_kind,
    exit_sizes,
    num_adapter_layers,
)
from layerskip_kernels.model.rope import rope_names, rope_tables
from layerskip_kernels.model.tensor_names import NORMS, layer_products
from layerskip_kernels.model.tokenizer import Tokenizer
from layerskip_kernels.model.weight_hash import HashedTensors, tensor_digest
from layerskip_kernels.model_config import ModelConfig
from layerskip_kernels.operands import DraftHead, LayerWeights, ModelSizes, ModelWeights
from layerskip_kernels.ops import Backend

__all__ = ["Model"]

Placer = Callable[[Tensor], Tensor]
QUANTISED_ROWS = 1024
FIRST_POSITIONS = 4096  # a larger cache extends the tables
EXIT_PARTS = (1 / 8, 1 / 4, 1 / 3, 1 / 2)  # of all layers: exits among which one is chosen on the way


@dataclass(frozen=True)
class Model:
    """Weights, sizes and the backend that runs them.

    ``weights`` are in ``dtype`` (matrices perhaps quantised), linear weights and the embedding in the backend's
    layout. ``draft_head``: a draft vocabulary, in the backend's layout; None: drafts may be any token.
    ``exit_adapter``: what drafts pass after its exit layer (`with_exit_adapter`); None: the head at once.
    """

    config: ModelConfig
    dtype: torch.dtype
    weights: ModelWeights
    backend: str
    tokenizer: Tokenizer | None = None
    name: str = "model"
    draft_head: DraftHead | None = None
    defaults: DraftDefaults | None = None  # how it is best run, where that was measured
    exit_adapter: ExitAdapter | None = None
    weights_digest: bytes | None = None  # SHA-256 of what was loaded to a GPU, and of how it was quantised

    @property
    def ops(self) -> Backend:
        return ops.backend(self.backend, self.weights.final_norm.device)

    @property
    def draft_ids(self) -> Tensor | None:
        """The draft vocabulary, int64 [N], ascending; None: all tokens."""
        return None if self.draft_head is None else self.draft_head.ids

    @property
    def draft_weights(self) -> ModelWeights:
        """What drafts are made with: the model's weights, under the exit adapter's final norm if there is one."""
        return self.weights if self.exit_adapter is None else self.exit_adapter.draft_weights

    @property
    def num_adapter_kv_layers(self) -> int:
        """Layers of the exit adapter that have K and V, which follow the model's in the cache."""
        return 0 if self.exit_adapter is None else self.exit_adapter.num_kv_layers

    @cached_property
    def sizes(self) -> ModelSizes:
        """What the tensors' shapes do not say, for run_layers and the passes made of it."""
        c = self.config
        tables = {name: table for table, name in enumerate(rope_names(c))}
        return ModelSizes(
            num_heads=c.num_heads,
            intermediate_size=c.intermediate_size,
            vocab_size=c.vocab_size,
            eps=c.rms_norm_eps,
            scale=c.softmax_scale,
            windows=c.layer_windows or (0,) * c.num_layers,
            ropes=tuple(tables.get(name, -1) for name in c.layer_ropes) or (0,) * c.num_layers,
            gelu=c.activation == "gelu_tanh",
            norm_offset=c.norm_offset,
            embedding_multiplier=float(torch.tensor(c.embedding_multiplier, dtype=self.dtype)),
            residual_multiplier=c.residual_multiplier,
            logits_multiplier=c.logits_multiplier,
            score_cap=c.score_cap,
            logits_cap=c.logits_cap,
        )

    @cached_property
    def layer_products(self) -> int:
        """tensor_names.layer_products, counted once."""
        return layer_products(self.config)

    @cached_property
    def adapter_products(self) -> int:
        """The same of all layers of the exit adapter."""
        layers = () if self.exit_adapter is None else self.exit_adapter.weights.layers[1:]
        return sum(layer_products(self.config, layer.attends) for layer in layers)

    @cached_property
    def identity(self) -> bytes:
        """What a token's K and V depend on besides the tokens: SHA-256 of config, dtype, backend and weights.

        An exit adapter's weights and layer belong to it: its K and V are the cache's, too.

        For what outlives the process: swap files. Weights on a GPU were hashed as they were loaded; others are read
        once here, with torch's number of threads.
        """
        weights = (
            [] if self.weights_digest is not None else [*self.weights.flat[:3], *self.weights.flat[5:]]
        )  # cos and sin follow from the config
        weights += [] if self.exit_adapter is None else self.exit_adapter.tensors
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            digests = list(threads.map(tensor_digest, weights))
        adapted = () if self.exit_adapter is None else (self.exit_adapter.exit_layer,)
        settings = repr((self.config, self.dtype, self.backend, *adapted)).encode() + (self.weights_digest or b"")
        return hashlib.sha256(hashlib.sha256(settings).digest() + b"".join(digests)).digest()

    def extend_positions(self, count: int) -> None:
        """Make cos and sin long enough for ``count`` positions, or for all that the model has, if they are not.

        A cache asks for what its pages can hold, so a config that allows millions of positions costs nothing until
        there is memory for them. Plans that were made before keep the shorter tables, which suffice for their caches;
        the values do not depend on the length.
        """
        count = min(count, self.config.max_positions)
        if count > self.weights.cos.size(1):
            place = self.ops.placer()
            cos, sin = rope_tables(self.config, count)
            self.weights.replace_tables(place(cos), place(sin))
        adapter = self.exit_adapter
        if adapter is not None and self.weights.cos.size(1) > adapter.weights.cos.size(1):
            for weights in (adapter.weights, adapter.draft_weights):
                weights.replace_tables(self.weights.cos, self.weights.sin)

    def has_kv_of(self, other: Model) -> bool:
        """Whether both compute the same K and V from the same tokens: one set of weights in memory, run the same way.

        The draft vocabulary, defaults, tokenizer and name do not matter. A checkpoint loaded twice counts as two
        models: to find out that they are equal would take a pass over all weights.
        """
        return self is other or (
            self.weights is other.weights
            and self.exit_adapter is other.exit_adapter
            and (self.config, self.dtype, self.backend) == (other.config, other.dtype, other.backend)
        )

    def draft_settings(self, config: GenerationConfig) -> tuple[int, int]:
        """The exit layer and the number of drafts that ``config`` means for this model.

        (0, 0) in plain decoding, no drafts for an early exit alone. What the config leaves open is that of
        ``defaults``; without it, a third of the layers and 4 drafts. "auto" begins with that exit, and has a largest
        number of drafts. With an exit adapter the exit is the adapter's. Raises ValueError for an exit layer that this
        model does not have, or that its exit adapter does not follow.
        """
        if config.strategy == "autoregressive":
            return 0, 0
        if config.strategy == "early_exit":
            return config.resolve_exit_layer(self.config.num_layers), 0
        chosen, default = self.defaults, self.defaults.exit_layer if self.defaults else None
        if self.exit_adapter is not None:
            default = self.exit_adapter.exit_layer
        exit_layer = config.resolve_exit_layer(self.config.num_layers, default)
        self.check_exit(exit_layer)
        if isinstance(config.num_speculations, int):
            return exit_layer, config.num_speculations
        if config.num_speculations == AUTO:
            return exit_layer, MOST_SPECULATIONS
        return exit_layer, (chosen.num_speculations if chosen else None) or NUM_SPECULATIONS

    def check_exit(self, exit_layer: int) -> None:
        """Raise ValueError unless this model's layers below the last can draft at ``exit_layer``."""
        if not 1 <= exit_layer < self.config.num_layers:
            raise ValueError(f"exit_layer must be in 1..{self.config.num_layers - 1}, got {exit_layer}")
        if self.exit_adapter is not None and exit_layer != self.exit_adapter.exit_layer:
            raise ValueError(
                f"exit_layer must be {self.exit_adapter.exit_layer}, which this model's exit adapter follows, got "
                f"{exit_layer}; leave it None, or use the model without the adapter (with_exit_adapter(None))"
            )

    def leaves_drafting_open(self, config: GenerationConfig) -> bool:
        """Whether something about drafting is chosen on the way: "auto", or neither config nor measurements say how."""
        measured = self.defaults is not None and self.defaults.num_speculations is not None
        said = measured or config.exit_layer is not None or config.num_speculations is not None
        return config.strategy == "self_speculative" and (config.asks_for_auto or not said)

    def draft_exits(self, config: GenerationConfig) -> tuple[int, ...]:
        """The exit layers that may draft, the first one to begin with; none where nothing is drafted."""
        if config.strategy != "self_speculative":
            return ()
        first, count = self.draft_settings(config)[0], self.config.num_layers
        chosen = config.exit_layer == AUTO or (config.exit_layer is None and self.defaults is None)
        if self.exit_adapter is not None or not (chosen and self.leaves_drafting_open(config)):
            return (first,)
        others = {min(count - 1, max(1, round(count * part))) for part in EXIT_PARTS}
        return (first, *sorted(others - {first}))

    def with_draft_vocab(self, token_ids: Iterable[int] | None) -> Model:
        """The same model, drafting only tokens of a list (None: any); verification still chooses among all of them.

        The LM head recurs with every draft, so a short list of frequent tokens makes drafts cheaper. Where an exit
        adapter has a head of its own, any means any of that. Raises ValueError for an empty list and for an id outside
        the vocabulary, or outside that head's.
        """
        whole = self.exit_adapter.head if self.exit_adapter is not None else None
        if token_ids is None:
            return replace(self, draft_head=whole)
        ids = sorted(set(token_ids))
        if not ids or ids[0] < 0 or ids[-1] >= self.config.vocab_size:
            shown = f"{len(ids)} ids" + (f" from {ids[0]} to {ids[-1]}" if ids else "")
            raise ValueError(f"draft_vocab must be token ids in 0..{self.config.vocab_size - 1}, got {shown}")
        draft_ids = rows = torch.tensor(ids)
        if whole is not None:
            rows = torch.searchsorted(whole.ids, draft_ids).clamp(max=len(whole.ids) - 1)
            if not torch.equal(whole.ids[rows], draft_ids):
                raise ValueError(
                    f"draft_vocab must be among the {len(whole.ids)} tokens of the exit adapter's own head; "
                    "leave it None, which means all of them"
                )
        head = self.ops.select_rows(self.weights.lm_head if whole is None else whole.weight, rows)
        held = self.ops.empty(*head.shape, dtype=head.dtype).copy_(head)
        return replace(self, draft_head=DraftHead(held, draft_ids))

    def with_exit_adapter(self, exit_layer: int | None, tensors: dict[str, Tensor] | None = None) -> Model:
        """The same model, whose drafts pass an adapter after ``exit_layer``, before the head (None: no adapter).

        ``tensors``: `exit_adapter.adapter_shapes`, of the model's dtype or quantised, on the CPU: the adapter's layers,
        each like one of the model's, its final norm, and perhaps a head with HEAD_IDS, which becomes the draft head.
        The model's own K, V, logits and text are what they are without. Raises ValueError for an exit layer outside
        1..L-1.
        """
        had_head = self.exit_adapter is not None and self.exit_adapter.head is not None
        bare = replace(self, exit_adapter=None, draft_head=None if had_head else self.draft_head)
        if exit_layer is None or tensors is None:
            return bare
        bare.check_exit(exit_layer)
        tensors, own = dict(tensors), self.weights
        pack_weight, place = self.ops.pack_weight, self.ops.placer()
        layers = tuple(
            _layer_weights(tensors, f"layers.{layer}.", lambda weight: place(pack_weight(weight)), place, self.config)
            for layer in range(num_adapter_layers(adapter_kind(tensors)))
        )
        head = DraftHead(place(pack_weight(tensors.pop(HEAD))), tensors.pop(HEAD_IDS)) if HEAD in tensors else None
        final_norm = place(tensors.pop("norm.weight"))
        drafting = replace(own, final_norm=final_norm)
        weights, sizes = replace(drafting, layers=layers[:1] + layers), exit_sizes(self.sizes, exit_layer, len(layers))
        adapter = ExitAdapter(exit_layer, drafting, weights, sizes, head)
        return replace(bare, draft_head=head or bare.draft_head, exit_adapter=adapter)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, backend: str = "cpu", weights: str | None = None,
        device: torch.device | None = None,
    ) -> Model:  # fmt: skip
        """Lay a checkpoint's tensors out for a backend, taking each out of ``checkpoint.tensors`` as it goes.

        ``device``: where the backend keeps the weights, and the model stays (None: its own choice, ops.backend).

        ``weights``: None and "16bit" keep them as they are; a type of quantise.WEIGHT_TYPES rounds the linear layers
        and the LM head to it, not the embedding and the norms; ``checkpoint`` has numbers then.
        """
        quantise.check_weights(weights)
        config, its = checkpoint.config, ops.backend(backend, device)
        pack_weight, place = its.pack_weight, its.placer()
        on_gpu = its.empty(0, dtype=checkpoint.dtype).is_cuda
        tensors = HashedTensors(checkpoint.tensors) if on_gpu else checkpoint.tensors

        def pack(weight: Tensor) -> Tensor:
            return place(pack_weight(weight))

        def pack_linear(weight: Tensor) -> Tensor:
            if weights in (None, "16bit"):
                return pack(weight)
            # Some rows at a time: quantising takes several times a weight's memory.
            return pack(torch.cat([quantise.quantise(rows, weights) for rows in weight.split(QUANTISED_ROWS)]))

        head_rows = tensors.pop("model.embed_tokens.weight")
        embedding = pack(head_rows)
        if not config.tie_word_embeddings:
            del head_rows
            head_rows = tensors.pop("lm_head.weight")
        shared = config.tie_word_embeddings and weights in (None, "16bit")
        lm_head = embedding if shared else pack_linear(head_rows)
        del head_rows
        cos, sin = rope_tables(config, min(config.max_positions, FIRST_POSITIONS))
        final_norm, cos, sin = place(tensors.pop("model.norm.weight")), place(cos), place(sin)
        layers = tuple(
            _layer_weights(tensors, f"model.layers.{layer}.", pack_linear, place, config)
            for layer in range(config.num_layers)
        )
        laid_out = ModelWeights(embedding, final_norm, lm_head, cos, sin, layers)
        defaults, digest = checkpoint.defaults, None
        if isinstance(tensors, HashedTensors):
            digest = hashlib.sha256(tensors.digest() + (weights or "16bit").encode()).digest()
        model = cls(
            config, checkpoint.dtype, laid_out, backend, checkpoint.tokenizer, checkpoint.name, defaults=defaults,
            weights_digest=digest,
        )  # fmt: skip
        return model.with_draft_vocab(defaults.draft_vocab) if defaults and defaults.draft_vocab else model


def _layer_weights(
    tensors: dict[str, Tensor] | HashedTensors, prefix: str, pack: Placer, place: Placer, config: ModelConfig
) -> LayerWeights:

    def take(name: str) -> Tensor:
        return tensors.pop(prefix + name)

    def bias(wanted: bool, *names: str) -> Tensor | None:
        return place(torch.cat([take(f"{name}_proj.bias") for name in names])) if wanted else None

    attends = f"{prefix}self_attn.q_proj.weight" in tensors
    places = {at: name for at, name in NORMS[config.norm_placement].items() if attends or at.startswith("mlp")}
    norms = {at: place(take(f"{name}.weight")) for at, name in places.items()}
    if attends and config.qk_norm != "none":
        norms |= {name: place(take(f"self_attn.{name}.weight")) for name in ("q_norm", "k_norm")}
    qkv_bias = bias(attends and config.qkv_bias, *(f"self_attn.{p}" for p in "qkv"))
    out_bias = bias(attends and config.out_bias, "self_attn.o")
    empty = place(torch.empty(0))
    wq, wk, wv, wo = (pack(take(f"self_attn.{p}_proj.weight")) if attends else empty for p in "qkvo")
    gate_up_bias, down_bias = bias(config.mlp_bias, "mlp.gate", "mlp.up"), bias(config.mlp_bias, "mlp.down")
    w_gate, w_up, w_down = (pack(take(f"mlp.{p}_proj.weight")) for p in ("gate", "up", "down"))
    return LayerWeights(
        wq=wq, wk=wk, wv=wv, qkv_bias=qkv_bias, wo=wo, out_bias=out_bias, w_gate=w_gate, w_up=w_up, w_down=w_down,
        gate_up_bias=gate_up_bias, down_bias=down_bias, **{"attn_norm": None, "mlp_norm": None, **norms},
    )  # fmt: skip
