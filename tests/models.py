"""Models of other packages, tiny and with random weights: what users of einsums and matrix products really run.

Each builder imports its package, so that a test of a package that is not installed is skipped, and takes sizes, of
which the defaults are tiny. ``arguments(size)`` makes the arguments for a size that varies in practice: a batch, a
sequence length, a number of edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lazy_einsum import OptimizedModule

ALL = float("inf")
DONE = "specialized"
Arguments = Callable[[int], tuple[Any, ...]]


@dataclass(frozen=True)
class Timed:
    """At which size a model is timed: one that someone might train on a processor, in some ten milliseconds a step.

    Attributes:
        text: the size in words.
        keywords: of the builder.
        arguments: for the model of this size.
        size: what the arguments are made for.
    """

    text: str
    keywords: dict[str, Any]
    arguments: Arguments
    size: int


@dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
        name: package and model.
        build: makes the module, on the random seed that is set.
        arguments: for a size.
        timed: the size for timing.
        fallbacks: how many calls may run as they are, for something that a first call sets up, or for good.
        share: the least part of the FLOPs of matrix products that lies in specializations.
        dtype: of its parameters and arguments.
        sizes: three that are tried.
        quick: whether it is among the few that run at each change.
    """

    name: str
    build: Callable[..., nn.Module]
    arguments: Arguments
    timed: Timed
    fallbacks: float = 0
    share: float = 0.9
    dtype: torch.dtype = torch.float64
    sizes: tuple[int, int, int] = (4, 6, 7)
    quick: bool = False


def flops(module: nn.Module, wrapped: OptimizedModule, arguments: tuple[Any, ...]) -> tuple[int, int]:
    """How many FLOPs of matrix products lie in specializations at a call, and how many there are, as torch counts them
    when ``module``, the child of ``wrapped``, runs.
    """
    before = wrapped.cache_info().fallbacks
    wrapped(*arguments)
    whole = wrapped.cache_info().fallbacks == before
    with FlopCounterMode(display=False) as counter:
        module(*arguments)
    counts = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    total = counts["Global"]
    if whole:
        return total, total
    done = [f"{type(module).__name__}.{name}" for name, state in wrapped.cache_info().parts.items() if state == DONE]
    return sum(counts[name] for name in _outermost(counts, done)), total


def _outermost(counts: dict[str, int], above: list[str]) -> list[str]:
    """Those in or below ``above`` that are below no other of them. (A module with two names is counted under one.)"""
    inside = [name for name in counts if any(f"{name}.".startswith(f"{other}.") for other in above)]
    return [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]


def _tokens(n: int, batch: int = 2) -> tuple[Tensor]:
    return (torch.randint(0, 50, (batch, n), generator=torch.Generator().manual_seed(n)),)


def _normal(*shape: int | str) -> Arguments:
    def arguments(n: int) -> tuple[Tensor]:
        sizes = [n if size == "n" else size for size in shape]
        return (torch.randn(sizes, generator=torch.Generator().manual_seed(n)),)  # type: ignore[arg-type]

    return arguments


_IMAGES = _normal("n", 3, 32, 32)
_LARGE_IMAGES = _normal("n", 3, 64, 64)


# -- equivariant networks ---------------------------------------------------------------------------------------------


def e3nn_convolution(times: int = 1) -> nn.Module:
    """Messages over edges, as nequip has them: a tensor product with weights from a radial network."""
    import e3nn
    import e3nn.nn
    from e3nn import o3

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.irreps = o3.Irreps(f"{8 * times}x0e+{4 * times}x1o+{2 * times}x2e")
            self.harmonics = o3.Irreps("0e+1o+2e")
            self.product = o3.FullyConnectedTensorProduct(
                self.irreps, self.harmonics, self.irreps, shared_weights=False
            )
            self.radial = e3nn.nn.FullyConnectedNet([8, 16, self.product.weight_numel], torch.nn.functional.silu)
            self.mix = o3.Linear(self.irreps, self.irreps)

        def forward(self, nodes: Tensor, positions: Tensor, edges: Tensor) -> Tensor:
            source, target = edges
            vectors = positions[target] - positions[source]
            harmonics = o3.spherical_harmonics(self.harmonics, vectors, True, normalization="component")
            lengths = e3nn.math.soft_one_hot_linspace(vectors.norm(dim=1), 0.0, 4.0, 8, "gaussian", cutoff=False)
            messages = self.product(nodes[source], harmonics, self.radial(lengths))
            return nodes + self.mix(torch.zeros_like(nodes).index_add(0, target, messages))

    return Convolution()


def _graph(n: int, times: int = 1, nodes: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    edges = torch.randint(0, nodes, (2, 10 * n), generator=generator)
    return torch.randn(nodes, 30 * times, generator=generator), torch.randn(nodes, 3, generator=generator), edges


def e3nn_gate(times: int = 1) -> nn.Module:
    """A tensor product, a gate and a linear layer."""
    from e3nn import nn as e3nn_layers
    from e3nn import o3

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            few, many = 8 * times, 16 * times
            irreps = f"{few}x0e+{few // 2}x1o"
            self.product = o3.FullyConnectedTensorProduct(irreps, irreps, f"{many}x0e+{few}x0e+{few}x1o")
            activations = [torch.nn.functional.silu], [torch.sigmoid]
            self.gate = e3nn_layers.Gate(f"{many}x0e", activations[0], f"{few}x0e", activations[1], f"{few}x1o")
            self.mix = o3.Linear(self.gate.irreps_out, irreps)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.mix(self.gate(self.product(x, y)))

    return Gated()


def _pairs(n: int, times: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 20 * times, generator=generator), torch.randn(n, 20 * times, generator=generator)


def egnn(dim: int = 16) -> nn.Module:
    """Equivariant graph network on distances."""
    from egnn_pytorch import EGNN

    return EGNN(dim=dim, edge_dim=4)


def _points(n: int, dim: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    shapes = (2, n, dim), (2, n, 3), (2, n, n, 4)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


# -- transformers -----------------------------------------------------------------------------------------------------


def x_decoder(dim: int = 32, depth: int = 2, length: int = 64) -> nn.Module:
    """Rotary positions."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=dim, depth=depth, heads=4, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=50, max_seq_len=length, attn_layers=layers)


def x_relative(dim: int = 32, depth: int = 2, length: int = 64) -> nn.Module:
    """Relative positions as in T5."""
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=dim, depth=depth, heads=4, rel_pos_bias=True)
    return TransformerWrapper(num_tokens=50, max_seq_len=length, attn_layers=layers)


def xlnet(dim: int = 32, depth: int = 2) -> nn.Module:
    """Relative attention written in einsums."""
    from transformers import XLNetConfig, XLNetModel

    sizes = {"d_model": dim, "n_layer": depth, "n_head": 4, "d_inner": 2 * dim}
    return XLNetModel(XLNetConfig(vocab_size=50, dropout=0.0, **sizes))


def bert(dim: int = 32, depth: int = 2) -> nn.Module:
    """An encoder."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": 4, "intermediate_size": 2 * dim}
    return BertModel(BertConfig(vocab_size=50, **sizes))


def lora(dim: int = 32, depth: int = 2, rank: int = 4) -> nn.Module:
    """Low-rank adapters on a GPT-2."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": dim, "n_layer": depth, "n_head": 4, "n_positions": 64}
    config = GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, use_cache=False, **sizes)
    return get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=rank, target_modules=["c_attn"], fan_in_fan_out=True))


def lokr(dim: int = 16) -> nn.Module:
    """Adapters that are Kronecker products."""
    from peft import LoKrConfig, get_peft_model

    base = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
    return get_peft_model(base, LoKrConfig(r=4, alpha=4, target_modules=["0", "2"]))


def performer(dim: int = 32, length: int = 64) -> nn.Module:
    """Linear attention by random features."""
    from performer_pytorch import PerformerLM

    sizes = {"max_seq_len": length, "dim": dim, "depth": 2, "heads": 4, "dim_head": dim // 4}
    return PerformerLM(num_tokens=50, causal=False, **sizes)


def linear_attention(dim: int = 32, length: int = 64) -> nn.Module:
    """Linear attention by softmax on features."""
    from linear_attention_transformer import LinearAttentionTransformerLM

    return LinearAttentionTransformerLM(num_tokens=50, dim=dim, heads=4, depth=2, max_seq_len=length)


def relative_vit(image: int = 32, dim: int = 32, depth: int = 2) -> nn.Module:
    """A vision transformer with relative positions."""
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    sizes: dict[str, Any] = {"img_size": image, "patch_size": 8, "embed_dim": dim, "depth": depth, "num_heads": 4}
    return VisionTransformerRelPos(num_classes=10, **sizes)


def swin(image: int = 32, dim: int = 16) -> nn.Module:
    """Windows of attention."""
    from timm.models.swin_transformer import SwinTransformer

    sizes: dict[str, Any] = {"img_size": image, "embed_dim": dim, "depths": (2, 2), "num_heads": (2, 4)}
    return SwinTransformer(patch_size=2, window_size=4, num_classes=10, **sizes)


def mixer(image: int = 32, dim: int = 32, depth: int = 2) -> nn.Module:
    """Products of matrices alone."""
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=image, patch_size=8, num_classes=10, embed_dim=dim, num_blocks=depth)


# -- factorized layers, operators, graphs -----------------------------------------------------------------------------


def factorized_linear(shape: tuple[int, ...] = (4, 4), rank: float = 0.5) -> nn.Module:
    """Weights as Tucker and tensor-train factors."""
    import tltorch

    return nn.Sequential(
        tltorch.FactorizedLinear(shape, shape, rank=rank, factorization="tucker"),
        nn.Tanh(),
        tltorch.FactorizedLinear(shape, shape, rank=rank, factorization="blocktt"),
    )


def tensor_regression(side: int = 4) -> nn.Module:
    """A tensor regression layer with CP factors."""
    import tltorch

    return tltorch.TRL((side, side, side), (10,), rank=0.5, factorization="cp")


def fourier_operator(modes: int = 4, hidden: int = 8, depth: int = 2) -> nn.Module:
    """A Fourier neural operator."""
    from neuralop.models import FNO

    return FNO(n_modes=(modes, modes), in_channels=1, out_channels=1, hidden_channels=hidden, n_layers=depth)


def tensorized_operator(modes: int = 4, hidden: int = 8, depth: int = 2) -> nn.Module:
    """The same with weights as Tucker factors, contracted as they are."""
    from neuralop.models import TFNO

    settings: dict[str, Any] = {"factorization": "tucker", "rank": 0.5, "implementation": "factorized"}
    sizes = {"hidden_channels": hidden, "n_layers": depth}
    return TFNO(n_modes=(modes, modes), in_channels=1, out_channels=1, **sizes, **settings)


def edge_network(channels: int = 8) -> nn.Module:
    """Messages by matrices that a network makes for each edge."""
    from torch_geometric.nn import NNConv

    return NNConv(channels, channels, nn.Linear(4, channels**2))


def _edges(n: int, channels: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    edges = torch.randint(0, n, (2, 3 * n), generator=generator)
    return torch.randn(n, channels, generator=generator), edges, torch.randn(3 * n, 4, generator=generator)


# -- the table --------------------------------------------------------------------------------------------------------

MODELS = [
    Model(
        "e3nn: convolution",
        e3nn_convolution,
        _graph,
        Timed("32x0e+16x1o+8x2e, 50 nodes, 400 edges", {"times": 4}, partial(_graph, times=4, nodes=50), 40),
        quick=True,
    ),
    Model(
        "e3nn: gated tensor product",
        e3nn_gate,
        _pairs,
        Timed("32x0e+16x1o, batch 128", {"times": 4}, partial(_pairs, times=4), 128),
    ),
    Model(
        "egnn-pytorch: EGNN",
        egnn,
        _points,
        Timed("dim 64, 2 x 32 points", {"dim": 64}, partial(_points, dim=64), 32),
        quick=True,
    ),
    Model(
        "x-transformers: decoder",
        x_decoder,
        _tokens,
        Timed("dim 128, 4 layers, 2 x 128 tokens", {"dim": 128, "depth": 4, "length": 128}, _tokens, 128),
        quick=True,
    ),
    Model(
        "x-transformers: relative positions",
        x_relative,
        _tokens,
        Timed("dim 128, 4 layers, 2 x 128 tokens", {"dim": 128, "depth": 4, "length": 128}, _tokens, 128),
    ),
    Model(
        "transformers: XLNet",
        xlnet,
        _tokens,
        Timed("dim 128, 4 layers, 4 x 64 tokens", {"dim": 128, "depth": 4}, partial(_tokens, batch=4), 64),
        dtype=torch.float32,
    ),
    Model(
        "transformers: BERT",
        bert,
        _tokens,
        Timed("dim 128, 4 layers, 4 x 64 tokens", {"dim": 128, "depth": 4}, partial(_tokens, batch=4), 64),
    ),
    Model(
        "peft: LoRA on GPT-2",
        lora,
        _tokens,
        Timed("dim 128, 4 layers, rank 8, 4 x 64", {"dim": 128, "depth": 4, "rank": 8}, partial(_tokens, batch=4), 64),
    ),
    Model(
        "peft: LoKr",
        lokr,
        _normal("n", 16),
        Timed("two layers 512 x 512, batch 256", {"dim": 512}, _normal("n", 512), 256),
        fallbacks=ALL,
        share=0.0,
    ),
    Model(
        "performer-pytorch",
        performer,
        _tokens,
        Timed("dim 128, 2 layers, 2 x 256 tokens", {"dim": 128, "length": 256}, _tokens, 256),
        fallbacks=ALL,
        quick=True,
    ),
    Model(
        "linear-attention-transformer",
        linear_attention,
        _tokens,
        Timed("dim 128, 2 layers, 2 x 256 tokens", {"dim": 128, "length": 256}, _tokens, 256),
    ),
    Model(
        "timm: ViT, relative positions",
        relative_vit,
        _IMAGES,
        Timed("dim 128, 4 layers, 4 images of 64^2", {"image": 64, "dim": 128, "depth": 4}, _LARGE_IMAGES, 4),
    ),
    Model(
        "timm: Swin",
        swin,
        _IMAGES,
        Timed("dim 32, 4 layers, 2 images of 64^2", {"image": 64, "dim": 32}, _LARGE_IMAGES, 2),
    ),
    Model(
        "timm: MLP-Mixer",
        mixer,
        _IMAGES,
        Timed("dim 128, 4 layers, 4 images of 64^2", {"image": 64, "dim": 128, "depth": 4}, _LARGE_IMAGES, 4),
    ),
    Model(
        "tensorly-torch: factorized linear",
        factorized_linear,
        _normal("n", 16),
        Timed("512 x 512 as (8, 8, 8)^2, batch 64", {"shape": (8, 8, 8), "rank": 0.1}, _normal("n", 512), 64),
        quick=True,
    ),
    Model(
        "tensorly-torch: regression",
        tensor_regression,
        _normal("n", 4, 4, 4),
        Timed("(16, 16, 16) to 10, batch 32", {"side": 16}, _normal("n", 16, 16, 16), 32),
    ),
    Model(
        "neuraloperator: FNO",
        fourier_operator,
        _normal("n", 1, 16, 16),
        Timed("12^2 modes, 32 channels, 2 x 32^2", {"modes": 12, "hidden": 32, "depth": 4}, _normal("n", 1, 32, 32), 2),
        fallbacks=2,
        dtype=torch.float32,
    ),
    Model(
        "neuraloperator: TFNO",
        tensorized_operator,
        _normal("n", 1, 16, 16),
        Timed("12^2 modes, 32 channels, 2 x 32^2", {"modes": 12, "hidden": 32, "depth": 4}, _normal("n", 1, 32, 32), 2),
        fallbacks=2,
        dtype=torch.float32,
    ),
    Model(
        "torch_geometric: NNConv",
        edge_network,
        _edges,
        Timed("32 channels, 100 nodes, 300 edges", {"channels": 32}, partial(_edges, channels=32), 100),
    ),
]
