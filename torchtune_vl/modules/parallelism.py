"""How the decoder divides over devices."""

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from torchtune_vl.modules.vision import VisionLanguageModel


def decoder_tp_plan(model: VisionLanguageModel) -> dict[str, ParallelStyle]:
    """Plan tensor parallelism (Megatron-LM, arXiv 1909.08053) of the decoder.

    Heads and feed-forward are divided, and the output layer where it is not the token embedding.
    Each device has the whole vision encoder, which is small beside the decoder, and computes all of
    it.

    Args:
        model: the model, without adapters.

    Returns:
        Styles by module, for :func:`torch.distributed.tensor.parallel.parallelize_module`.

    Raises:
        ValueError: if the model has adapters.
    """
    layer = {
        "attn.q_proj": ColwiseParallel(),
        "attn.k_proj": ColwiseParallel(),
        "attn.v_proj": ColwiseParallel(),
        "attn.output_proj": RowwiseParallel(),
        "mlp.w1": ColwiseParallel(),
        "mlp.w3": ColwiseParallel(),
        "mlp.w2": RowwiseParallel(),
    }
    for name in layer:
        if type(model.decoder.layers[0].get_submodule(name)) is not nn.Linear:
            raise ValueError(
                "layers with adapters or quantized weights do not divide over devices: set "
                "parallel.tensor to 1, where these methods need no more"
            )
    plan: dict[str, ParallelStyle] = {
        f"decoder.layers.{i}.{name}": style
        for i in range(len(model.decoder.layers))
        for name, style in layer.items()
    }
    if isinstance(model.decoder.output, nn.Linear):
        plan["decoder.output"] = ColwiseParallel(output_layouts=Replicate())
    return plan
