"""A PyTorch training step with our own weights, with which our step is compared.

Encoder-decoders are the modelling file that ``encdec export`` ships, decoder-only models the same
blocks as one causal stack. Rows are unpacked, as that file reads them. The step is what a careful
user of PyTorch would write: fused AdamW or Muon, clipping, the vocabulary head on target
positions alone; bfloat16 by autocast with float32 master weights, as ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from encdec.export import equivalents, family_export, huggingface_export
from encdec.export.shipped.configuration_encdec import EncdecConfig
from encdec.export.shipped.modeling_encdec import EncdecForConditionalGeneration, EncdecStack
from encdec.interop.layout import Entry, attention_entries, mlp_entries, to_theirs
from encdec.machine import available_cores
from encdec.model import ModelConfig
from encdec.model.positions import rope_frequencies
from encdec.train.run_fields import OptimizerConfig

Batch = Mapping[str, np.ndarray]


class CausalStack(EncdecStack):
    """A decoder-only model of the shipped blocks: the last ``targets`` positions' logits."""

    def __init__(self, config: EncdecConfig, targets: int) -> None:
        super().__init__(config, config.decoder_layers, cross=False)
        self.targets = targets
        self.is_encoder, self.global_layers = False, set(config.decoder_global_layers)
        self.unrotated_layers = set(config.decoder_unrotated_layers)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of the row's last T positions, from ids [B, S + T]."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        allowed = (places <= places[:, None])[None, None].expand(len(input_ids), -1, -1, -1)
        x = self.embed(input_ids, None)
        x = self.run(x, allowed, self.rope(places[None]), False, False)[0]
        return nn.functional.linear(x[:, -self.targets :], self.embed_tokens.weight)


class TwoStacks(nn.Module):
    """The shipped encoder-decoder as a function of a batch."""

    def __init__(self, config: EncdecConfig) -> None:
        super().__init__()
        self.model = EncdecForConditionalGeneration(config)

    def forward(self, source_ids: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] from source ids [B, S] and decoder inputs [B, T]."""
        return self.model(source_ids, decoder_input_ids=target_ids).logits


def build(config: ModelConfig, params: Any, targets: int) -> nn.Module:
    """The PyTorch module that computes what ``config`` with ``params`` computes.

    Args:
        config: a model with tied embeddings that the shipped modelling file can express.
        params: its float32 parameters.
        targets: T, target tokens of a row; those that a decoder-only model predicts.
    """
    config, params = equivalents.on_host(config, params)
    if config.is_encoder_decoder:
        values, tensors = huggingface_export.own(config, params)
        module: nn.Module = TwoStacks(EncdecConfig(**values))
        target: Any = module.model
    else:
        values = {
            name: getattr(config, name)
            for name in EncdecConfig().to_dict()
            if hasattr(config, name) and name not in ("architecture", "dtype")
        } | {
            "attention_scale": config.attention_logit_scale,
            "rope_frequencies": np.asarray(rope_frequencies(config)).tolist(),
            "mlp_activation": family_export.ACTIVATIONS[config.mlp_activation],
        }
        target = module = CausalStack(EncdecConfig(**values), targets)
        tensors = to_theirs(_causal_layout(config), params)
    state = {name: torch.tensor(np.asarray(x)) for name, x in tensors.items()}
    missing, unexpected = target.load_state_dict(state, strict=False)
    tied = ("lm_head.weight", "encoder.embed_tokens.weight")
    if unexpected or set(missing) - set(tied):
        raise KeyError(
            f"the PyTorch module has no parameters {unexpected}, or gets no values for {missing}"
        )
    if config.is_encoder_decoder:
        target.tie_weights()
    return module.train()


def _causal_layout(config: ModelConfig) -> list[Entry]:
    entries = [
        Entry("embed_tokens.weight", "embedder/embedding"),
        Entry("norm.weight", "decoder/final_norm/scale"),
    ]
    for layer in range(config.decoder_layers):
        theirs, ours = f"layers.{layer}", f"decoder/layers_{layer}"
        entries += attention_entries(config, f"{theirs}.self_attn", f"{ours}/self_attention")
        entries += mlp_entries(config, f"{theirs}.mlp", f"{ours}/mlp")
        for theirs_name, our_name in (("self_attn", "self_attention"), ("mlp", "mlp")):
            entries.append(
                Entry(f"{theirs}.pre_{theirs_name}_norm.weight", f"{ours}/{our_name}_norm/scale")
            )
    return entries


class TorchStep:
    """One optimizer step at a time on one batch.

    Args:
        module: from ``build``.
        config: its configuration; ``config.dtype`` bfloat16 means autocast.
        optimizer: AdamW, or Muon for the matrices of the layers with AdamW for the rest.
        batch: fields of an unpacked batch of ours.
        compiled: by ``torch.compile``.
        device: cpu or cuda.
    """

    def __init__(
        self,
        module: nn.Module,
        config: ModelConfig,
        optimizer: OptimizerConfig,
        batch: Batch,
        *,
        compiled: bool,
        device: str = "cpu",
    ) -> None:
        if device == "cpu":
            torch.set_num_threads(available_cores())
        self._module = module.to(device)
        self._optimizers = _optimizers(module, optimizer, device)
        self._clip = optimizer.clip_norm
        self._parameters = list(module.parameters())
        put = lambda name: torch.as_tensor(np.asarray(batch[name], np.int64), device=device)
        if config.is_encoder_decoder:
            self._inputs: tuple[torch.Tensor, ...] = (
                put("encoder_input_tokens"),
                put("decoder_input_tokens"),
            )
            self._labels = put("decoder_target_tokens").flatten()
        else:
            self._inputs = (put("decoder_input_tokens"),)
            self._labels = put("decoder_target_tokens")[:, -cast(int, module.targets) :].flatten()
        self._autocast: Callable[[], Any] = contextlib.nullcontext
        if config.dtype == "bfloat16":
            self._autocast = lambda: torch.autocast(device, torch.bfloat16)
        self._loss = torch.compile(self._forward) if compiled else self._forward

    def _forward(self) -> torch.Tensor:
        logits = self._module(*self._inputs).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), self._labels)

    def __call__(self) -> torch.Tensor:
        """Takes the step; the loss before it, a scalar."""
        for one in self._optimizers:
            one.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self._loss()
        loss.backward()
        if self._clip:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        for one in self._optimizers:
            one.step()
        return loss.detach()


def _optimizers(
    module: nn.Module, config: OptimizerConfig, device: str
) -> list[torch.optim.Optimizer]:
    """AdamW of all, or Muon of the layers' matrices and AdamW of the rest; decay of matrices."""
    named = list(module.named_parameters())
    matrices = [(name, x) for name, x in named if x.ndim == 2]
    vectors = [x for _, x in named if x.ndim != 2]
    found: list[torch.optim.Optimizer] = []
    if config.name == "muon":
        layers = [x for name, x in matrices if ".layers." in f".{name}"]
        matrices = [(name, x) for name, x in matrices if ".layers." not in f".{name}"]
        found.append(
            torch.optim.Muon(
                layers,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = [
        {"params": [x for _, x in matrices], "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    found.append(
        torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.b1, config.b2),
            eps=config.eps,
            fused=True,
        )
    )
    return found
