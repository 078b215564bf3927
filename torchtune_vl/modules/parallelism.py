"""How the decoder divides over devices."""

from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from torchtune_vl.modules.linear import Linear
from torchtune_vl.modules.vision import VisionLanguageModel

_DIVIDED: dict[type[ParallelStyle], tuple[str, ...]] = {
    ColwiseParallel: ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3"),
    RowwiseParallel: ("attn.output_proj", "mlp.w2"),
}


def decoder_tp_plan(model: VisionLanguageModel) -> dict[str, ParallelStyle]:
    """Plan tensor parallelism (Megatron-LM, arXiv 1909.08053) of the decoder.

    Heads and feed-forward are divided, and the output layer where it is not the token embedding.
    Each device computes the whole vision encoder, which is small. Returns styles by module, for
    torch's ``parallelize_module``. Raises ``ValueError`` for adapters or quantized weights.
    """
    plan: dict[str, ParallelStyle] = {
        f"decoder.layers.{i}.{name}": style()
        for i in range(len(model.decoder.layers))
        for style, names in _DIVIDED.items()
        for name in names
    }
    if any(type(model.get_submodule(name)) is not Linear for name in plan):
        problem = "layers with adapters or quantized weights do not divide over devices"
        raise ValueError(f"{problem}: set parallel.tensor to 1, where these methods need no more")
    if isinstance(model.decoder.output, Linear):
        plan["decoder.output"] = ColwiseParallel(output_layouts=Replicate())
    return plan
