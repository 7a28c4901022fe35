"""Models of other packages, tiny and with random weights: what users of einsums and matrix products really run.

Each builder imports its package, so that a test of a package that is not installed is skipped. ``argument(size)`` makes
the arguments for a size that varies in practice: a batch, a sequence length, a number of edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALL = float("inf")
Arguments = Callable[[int], tuple[Any, ...]]


@dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
        name: package and model.
        build: makes the module, on the random seed that is set.
        arguments: for a size.
        fallbacks: how many calls may run as they are, for something that a first call sets up, or for good.
        share: the least part of the FLOPs of matrix products that lies in specializations.
        dtype: of its parameters and arguments.
        sizes: three that are tried.
        quick: whether it is among the few that run at each change.
    """

    name: str
    build: Callable[[], nn.Module]
    arguments: Arguments
    fallbacks: float = 0
    share: float = 0.9
    dtype: torch.dtype = torch.float64
    sizes: tuple[int, int, int] = (4, 6, 7)
    quick: bool = False


def _tokens(n: int) -> tuple[Tensor]:
    return (torch.randint(0, 50, (2, n), generator=torch.Generator().manual_seed(n)),)


def _normal(*shape: int | str) -> Arguments:
    def arguments(n: int) -> tuple[Tensor]:
        sizes = [n if size == "n" else size for size in shape]
        return (torch.randn(sizes, generator=torch.Generator().manual_seed(n)),)  # type: ignore[arg-type]

    return arguments


def _images(n: int) -> tuple[Tensor]:
    return _normal("n", 3, 32, 32)(n)  # type: ignore[return-value]


# -- equivariant networks ---------------------------------------------------------------------------------------------


def e3nn_convolution() -> nn.Module:
    """Messages over edges, as nequip has them: a tensor product with weights from a radial network."""
    import e3nn
    import e3nn.nn
    from e3nn import o3

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.irreps = o3.Irreps("8x0e+4x1o+2x2e")
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


def _graph(n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    edges = torch.randint(0, 10, (2, 10 * n), generator=generator)
    return torch.randn(10, 30, generator=generator), torch.randn(10, 3, generator=generator), edges


def e3nn_gate() -> nn.Module:
    """A tensor product, a gate and a linear layer."""
    from e3nn import nn as e3nn_layers
    from e3nn import o3

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            irreps = "8x0e+4x1o"
            self.product = o3.FullyConnectedTensorProduct(irreps, irreps, "16x0e+8x0e+8x1o")
            self.gate = e3nn_layers.Gate("16x0e", [torch.nn.functional.silu], "8x0e", [torch.sigmoid], "8x1o")
            self.mix = o3.Linear(self.gate.irreps_out, irreps)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.mix(self.gate(self.product(x, y)))

    return Gated()


def _pairs(n: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 20, generator=generator), torch.randn(n, 20, generator=generator)


def egnn() -> nn.Module:
    """Equivariant graph network on distances."""
    from egnn_pytorch import EGNN

    return EGNN(dim=16, edge_dim=4)


def _egnn_arguments(n: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    shapes = (2, n, 16), (2, n, 3), (2, n, n, 4)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


# -- transformers -----------------------------------------------------------------------------------------------------


def x_decoder() -> nn.Module:
    """Rotary positions."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=4, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=50, max_seq_len=64, attn_layers=layers)


def x_relative() -> nn.Module:
    """Relative positions as in T5."""
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=32, depth=2, heads=4, rel_pos_bias=True)
    return TransformerWrapper(num_tokens=50, max_seq_len=64, attn_layers=layers)


def xlnet() -> nn.Module:
    """Relative attention written in einsums."""
    from transformers import XLNetConfig, XLNetModel

    return XLNetModel(XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=4, d_inner=64, dropout=0.0))


def bert() -> nn.Module:
    """An encoder."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=50, **sizes))


def lora() -> nn.Module:
    """Low-rank adapters on a GPT-2."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))


def lokr() -> nn.Module:
    """Adapters that are Kronecker products."""
    from peft import LoKrConfig, get_peft_model

    base = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    return get_peft_model(base, LoKrConfig(r=4, alpha=4, target_modules=["0", "2"]))


def performer() -> nn.Module:
    """Linear attention by random features."""
    from performer_pytorch import PerformerLM

    return PerformerLM(num_tokens=50, max_seq_len=64, dim=32, depth=2, heads=4, dim_head=8, causal=False)


def linear_attention() -> nn.Module:
    """Linear attention by softmax on features."""
    from linear_attention_transformer import LinearAttentionTransformerLM

    return LinearAttentionTransformerLM(num_tokens=50, dim=32, heads=4, depth=2, max_seq_len=64)


def relative_vit() -> nn.Module:
    """A vision transformer with relative positions."""
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return VisionTransformerRelPos(img_size=32, patch_size=8, num_classes=10, embed_dim=32, depth=2, num_heads=4)


def swin() -> nn.Module:
    """Windows of attention."""
    from timm.models.swin_transformer import SwinTransformer

    sizes: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    return SwinTransformer(img_size=32, patch_size=2, window_size=4, num_classes=10, **sizes)


def mixer() -> nn.Module:
    """Products of matrices alone."""
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=32, patch_size=8, num_classes=10, embed_dim=32, num_blocks=2)


# -- factorized layers, operators, graphs -----------------------------------------------------------------------------


def factorized_linear() -> nn.Module:
    """Weights as Tucker and tensor-train factors."""
    import tltorch

    return nn.Sequential(
        tltorch.FactorizedLinear((4, 4), (4, 4), rank=0.5, factorization="tucker"),
        nn.Tanh(),
        tltorch.FactorizedLinear((4, 4), (4, 4), rank=0.5, factorization="blocktt"),
    )


def tensor_regression() -> nn.Module:
    """A tensor regression layer with CP factors."""
    import tltorch

    return tltorch.TRL((4, 4, 4), (10,), rank=0.5, factorization="cp")


def fourier_operator() -> nn.Module:
    """A Fourier neural operator."""
    from neuralop.models import FNO

    return FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2)


def tensorized_operator() -> nn.Module:
    """The same with weights as Tucker factors, contracted as they are."""
    from neuralop.models import TFNO

    settings: dict[str, Any] = {"factorization": "tucker", "rank": 0.5, "implementation": "factorized"}
    return TFNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2, **settings)


def edge_network() -> nn.Module:
    """Messages by matrices that a network makes for each edge."""
    from torch_geometric.nn import NNConv

    return NNConv(8, 8, nn.Linear(4, 64))


def _edge_arguments(n: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    edges = torch.randint(0, n, (2, 3 * n), generator=generator)
    return torch.randn(n, 8, generator=generator), edges, torch.randn(3 * n, 4, generator=generator)


MODELS = [
    Model("e3nn: convolution", e3nn_convolution, _graph, quick=True),
    Model("e3nn: gated tensor product", e3nn_gate, _pairs),
    Model("egnn-pytorch: EGNN", egnn, _egnn_arguments, quick=True),
    Model("x-transformers: decoder", x_decoder, _tokens, quick=True),
    Model("x-transformers: relative positions", x_relative, _tokens),
    Model("transformers: XLNet", xlnet, _tokens, dtype=torch.float32),
    Model("transformers: BERT", bert, _tokens),
    Model("peft: LoRA on GPT-2", lora, _tokens),
    Model("peft: LoKr", lokr, _normal("n", 16), fallbacks=ALL, share=0.0),
    Model("performer-pytorch", performer, _tokens, fallbacks=ALL, quick=True),
    Model("linear-attention-transformer", linear_attention, _tokens),
    Model("timm: ViT, relative positions", relative_vit, _images),
    Model("timm: Swin", swin, _images),
    Model("timm: MLP-Mixer", mixer, _images),
    Model("tensorly-torch: factorized linear", factorized_linear, _normal("n", 16), quick=True),
    Model("tensorly-torch: regression", tensor_regression, _normal("n", 4, 4, 4)),
    Model("neuraloperator: FNO", fourier_operator, _normal("n", 1, 16, 16), fallbacks=2, dtype=torch.float32),
    Model("neuraloperator: TFNO", tensorized_operator, _normal("n", 1, 16, 16), fallbacks=2, dtype=torch.float32),
    Model("torch_geometric: NNConv", edge_network, _edge_arguments),
]
