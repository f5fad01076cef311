"""OPT: LayerNorm, biases, learned positions, ReLU: the architecture on which OmniQuant shifts channels too."""

from bitwright.core.block import Architecture, Family, LinearGroup, Side, Site, Topology
from bitwright.core.decoder import Config
from bitwright.core.errors import RecipeError

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O, FC1, FC2 = "self_attn.out_proj", "fc1", "fc2"


def family(config: Config) -> Family:
    """Describe the blocks of an OPT model with this config.json. Raises RecipeError for one whose norms come after."""
    if not config["do_layer_norm_before"] or config["word_embed_proj_dim"] != config["hidden_size"]:
        raise RecipeError(
            "this OPT model normalizes after attention and MLP or projects its embeddings (opt-350m does); "
            "Bitwright knows the others: 125m, 1.3b, 2.7b, 6.7b, 13b, 30b, 66b"
        )
    groups = (
        LinearGroup(QKV, enclosing="self_attn"),
        LinearGroup((O,), enclosing=O),
        LinearGroup((FC1,), enclosing=FC1),
        LinearGroup((FC2,), enclosing=FC2),
    )
    return Family(
        attention_class="OPTAttention",
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        topology=Topology(groups, _sites(config)),
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        flattened=((FC1, config["hidden_size"]), (FC2, config["ffn_dim"])),
    )


def _sites(config: Config) -> tuple[Site, ...]:
    hidden, bias = config["hidden_size"], bool(config["enable_bias"] and config["layer_norm_elementwise_affine"])
    sites = [
        Site("norm->qkv", (Side("self_attn_layer_norm"),), tuple(map(Side, QKV)), hidden, shift=bias),
        Site("q.k", (Side(QKV[0]), Side(QKV[1], reciprocal=True)), (), hidden),
        Site("v->o", (Side(QKV[2]),), (Side(O),), hidden, shift=bool(config["enable_bias"])),
        Site("norm->fc1", (Side("final_layer_norm"),), (Side(FC1),), hidden, shift=bias),
    ]
    if config["activation_function"] == "relu":  # ReLU(x / s) = ReLU(x) / s for positive s
        sites.append(Site("fc1->fc2", (Side(FC1),), (Side(FC2),), config["ffn_dim"], paper=False))
    return tuple(sites)


ARCHITECTURE = Architecture(family=family)
