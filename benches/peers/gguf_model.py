"""A GGUF file of random weights in the architecture `deepseek2`, as llama.cpp reads it: MLA with `kv_b` split into
`attn_k_b` (absorbed into the query) and `attn_v_b`, sigmoid routing with bias and groups, shared expert, leading dense
layer. No tokenizer: the file says `no_vocab` and how many tokens there are.
"""

import math


def tensors(sizes):
    """Name and shape (outermost first) of every tensor, in the order of the file."""
    hidden, heads, experts = sizes["hidden_size"], sizes["num_attention_heads"], sizes["n_routed_experts"]
    latent, rope, value = sizes["kv_lora_rank"], sizes["qk_rope_head_dim"], sizes["v_head_dim"]
    query, nope, width = sizes["q_lora_rank"], sizes["qk_nope_head_dim"], sizes["moe_intermediate_size"]
    shared = width * sizes["n_shared_experts"]
    yield "token_embd.weight", (sizes["vocab_size"], hidden)
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (sizes["vocab_size"], hidden)
    for layer in range(sizes["num_hidden_layers"]):
        here = f"blk.{layer}."
        yield here + "attn_norm.weight", (hidden,)
        yield here + "attn_q_a.weight", (query, hidden)
        yield here + "attn_q_a_norm.weight", (query,)
        yield here + "attn_q_b.weight", (heads * (nope + rope), query)
        yield here + "attn_kv_a_mqa.weight", (latent + rope, hidden)
        yield here + "attn_kv_a_norm.weight", (latent,)
        yield here + "attn_k_b.weight", (heads, latent, nope)
        yield here + "attn_v_b.weight", (heads, value, latent)
        yield here + "attn_output.weight", (hidden, heads * value)
        yield here + "ffn_norm.weight", (hidden,)
        if layer < sizes["first_k_dense_replace"]:
            yield here + "ffn_gate.weight", (sizes["intermediate_size"], hidden)
            yield here + "ffn_up.weight", (sizes["intermediate_size"], hidden)
            yield here + "ffn_down.weight", (hidden, sizes["intermediate_size"])
            continue
        yield here + "ffn_gate_inp.weight", (experts, hidden)
        yield here + "exp_probs_b.bias", (experts,)
        yield here + "ffn_gate_exps.weight", (experts, width, hidden)
        yield here + "ffn_up_exps.weight", (experts, width, hidden)
        yield here + "ffn_down_exps.weight", (experts, hidden, width)
        yield here + "ffn_gate_shexp.weight", (shared, hidden)
        yield here + "ffn_up_shexp.weight", (shared, hidden)
        yield here + "ffn_down_shexp.weight", (hidden, shared)


def kind_of(name, shape, kind):
    """BF16, F16 or Q8_0 for matrices; norms, router and its bias stay F32, as llama.cpp's own conversion keeps them."""
    return "F32" if len(shape) == 1 or "ffn_gate_inp" in name else kind


def bytes_of(name, shape, kind):
    """Size in the file: a block of Q8_0 is 32 codes and a 16-bit scale."""
    bits = {"F32": 32, "BF16": 16, "F16": 16, "Q8_0": 8.5}[kind_of(name, shape, kind)]
    return math.prod(shape) * bits / 8


def bytes_read(sizes, kind, batch, context):
    """What a step of decoding reads at least, counted as `bench decode` counts it: weights but for the embedding, of the
    routed experts as many as level routing touches, and the latents, which llama.cpp keeps in F16."""
    share = 1 - (1 - sizes["num_experts_per_tok"] / sizes["n_routed_experts"]) ** batch
    weights = sum(
        bytes_of(name, shape, kind) * (share if "_exps" in name else 1)
        for name, shape in tensors(sizes)
        if not name.startswith("token_embd")
    )
    token = 2 * sizes["num_hidden_layers"] * (sizes["kv_lora_rank"] + sizes["qk_rope_head_dim"])
    return weights + batch * (context + 1) * token


def values(rng, name, shape, sigma):
    import numpy

    if name.endswith("norm.weight"):
        return numpy.ones(shape, numpy.float32)
    if name.endswith(".bias"):
        return numpy.zeros(shape, numpy.float32)
    # Level, with the variance of N(0, σ²), as ours are.
    return (rng.random(shape, numpy.float32) - numpy.float32(0.5)) * numpy.float32(sigma * math.sqrt(12))


def encoded(array, kind):
    """Bytes of a tensor, rows innermost."""
    import numpy

    if kind == "F32":
        return array
    if kind == "F16":
        return array.astype(numpy.float16)
    if kind == "BF16":
        # To nearest; ties, which random numbers hardly have, go up.
        return ((array.view(numpy.uint32) + numpy.uint32(0x8000)) >> numpy.uint32(16)).astype(numpy.uint16)
    blocks = array.reshape(-1, 32)
    scales = (numpy.abs(blocks).max(axis=1, keepdims=True) / 127).astype(numpy.float16)
    codes = numpy.rint(blocks / scales.astype(numpy.float32)).clip(-127, 127).astype(numpy.int8)
    packed = numpy.concatenate([scales.view(numpy.uint8), codes.view(numpy.uint8)], axis=1)
    return packed.reshape(*array.shape[:-1], array.shape[-1] // 32 * 34)


def header(writer, gguf, sizes):
    """What the loader of `deepseek2` asks for."""
    latent, rope = sizes["kv_lora_rank"], sizes["qk_rope_head_dim"]
    writer.add_name("random weights")
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    # The latent is the one key and value of all heads.
    writer.add_head_count_kv(1)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(sizes["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(sizes["v_head_dim"])
    writer.add_q_lora_rank(sizes["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_leading_dense_block_count(sizes["first_k_dense_replace"])
    writer.add_expert_count(sizes["n_routed_experts"])
    writer.add_expert_used_count(sizes["num_experts_per_tok"])
    writer.add_expert_shared_count(sizes["n_shared_experts"])
    writer.add_expert_group_count(sizes["n_group"])
    writer.add_expert_group_used_count(sizes["topk_group"])
    writer.add_expert_feed_forward_length(sizes["moe_intermediate_size"])
    writer.add_expert_weights_scale(sizes["routed_scaling_factor"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_tokenizer_model("no_vocab")


def write(path, sizes, kind):
    """Writes the file tensor by tensor; a file that is not whole never has the name."""
    import gguf
    import numpy

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "deepseek2")
    header(writer, gguf, sizes)
    for name, shape in tensors(sizes):
        stored = kind_of(name, shape, kind)
        size = int(bytes_of(name, shape, kind))
        writer.add_tensor_info(name, shape, numpy.float32, size, gguf.GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = numpy.random.default_rng(1)
    for name, shape in tensors(sizes):
        array = values(rng, name, shape, sizes["initializer_range"])
        writer.write_tensor_data(encoded(array, kind_of(name, shape, kind)))
    writer.close()
    part.rename(path)
