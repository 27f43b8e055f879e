"""The default table against names of published models, each alone in its tree."""

import pytest

from optax_muon.matrices.default_rules import classify as classify_in
from optax_muon.matrices.evidence import Tree


def classify(path, shape):
    return classify_in(path, Tree({path: shape}))


# path, shape, expected: `adamw`, or batch x (rows x cols). Shapes are those of the published models
# (or of a 512-wide toy); readings were written by hand from each model's forward pass.
READINGS = """
# Moonlight and DeepSeek as torch and equinox name them, (out, in)
model/embed_tokens/weight                              163840,2048    adamw
model/layers/1/self_attn/q_proj/weight                 3072,2048      1 x (2048 x 3072)
model/layers/1/self_attn/kv_a_proj_with_mqa/weight     576,2048       1 x (2048 x 576)
model/layers/1/self_attn/kv_a_layernorm/weight         512            adamw
model/layers/1/self_attn/kv_b_proj/weight              4096,512       1 x (512 x 4096)
model/layers/1/mlp/gate/weight                         64,2048        1 x (2048 x 64)
model/layers/1/mlp/gate/e_score_correction_bias        64             adamw
model/layers/1/mlp/experts/0/gate_proj/weight          1408,2048      1 x (2048 x 1408)
model/layers/1/mlp/experts/gate_proj                   64,2048,1408   64 x (2048 x 1408)
model/layers/1/mlp/shared_experts/down_proj/weight     2048,2816      1 x (2816 x 2048)
model/layers/1/input_layernorm/weight                  2048           adamw
lm_head/weight                                         163840,2048    adamw
model.layers.0.self_attn.q_proj.weight                 512,512        1 x (512 x 512)
model.layers.0.input_layernorm.weight                  512            adamw
# Llama of this package, scanned
embed/embedding                                        32000,512      adamw
layers/attn/q_proj/kernel                              12,512,512     12 x (512 x 512)
layers/attn/o_proj/kernel                              12,512,512     12 x (512 x 512)
layers/mlp/gate_proj/kernel                            12,512,2048    12 x (512 x 2048)
layers/mlp/down_proj/kernel                            12,2048,512    12 x (2048 x 512)
layers/attn_norm/scale                                 12,512         adamw
layers/mlp_norm/scale                                  12,512         adamw
layers/attn/q_norm/scale                               12,64          adamw
final_norm/scale                                       512            adamw
lm_head/kernel                                         512,32000      adamw
# the same in one flat dict
layers/wq                                              12,512,512     12 x (512 x 512)
layers/wo                                              12,512,512     12 x (512 x 512)
layers/w1                                              12,512,2048    12 x (512 x 2048)
layers/attn_norm                                       12,512         adamw
# MaxText, layers in a loop
token_embedder/embedding                               32000,4096     adamw
decoder/layers_0/self_attention/query/kernel           4096,32,128    1 x (4096 x 4096)
decoder/layers_0/self_attention/key/kernel             4096,8,128     1 x (4096 x 1024)
decoder/layers_0/self_attention/out/kernel             32,128,4096    1 x (4096 x 4096)
decoder/layers_0/self_attention/wq_a/kernel            7168,1536      1 x (7168 x 1536)
decoder/layers_0/self_attention/wq_b/kernel            1536,128,192   1 x (1536 x 24576)
decoder/layers_0/self_attention/wkv_a/kernel           7168,576       1 x (7168 x 576)
decoder/layers_0/self_attention/wkv_b/kernel           512,128,256    1 x (512 x 32768)
decoder/layers_0/mlp/wi_0/kernel                       4096,14336     1 x (4096 x 14336)
decoder/layers_0/MoeBlock_0/gate/kernel                4096,8         1 x (4096 x 8)
decoder/layers_0/MoeBlock_0/wi_0                       8,4096,14336   8 x (4096 x 14336)
decoder/layers_0/MoeBlock_0/wo                         8,14336,4096   8 x (14336 x 4096)
decoder/layers_0/pre_self_attention_layer_norm/scale   4096           adamw
decoder/layers_0/self_attention/o_a_proj/kernel        8,4096,1024    8 x (4096 x 1024)
decoder/layers_0/mhc_attention/res_beta                4,4            adamw
decoder/logits_dense/kernel                            4096,32000     adamw
# MaxText, layers stacked along axis 1: what needs no stack axis to be known
decoder/layers/MoeBlock_0/wi_0                         8,32,4096,14336  256 x (4096 x 14336)
decoder/layers/pre_self_attention_layer_norm/scale     4096,32        adamw
# GPT-2 as Hugging Face names it, in a loop and scanned
transformer/wte/embedding                              50257,768      adamw
transformer/wpe/embedding                              1024,768       adamw
transformer/h/0/attn/c_attn/kernel                     768,2304       1 x (768 x 2304)
transformer/h/0/ln_1/scale                             768            adamw
transformer/h/attn/c_attn/kernel                       12,768,2304    12 x (768 x 2304)
transformer/h/attn/c_attn/bias                         12,2304        adamw
transformer/h/ln_1/scale                               12,768         adamw
transformer/ln_f/scale                                 768            adamw
# Gemma
transformer/embedder/input_embedding                   256128,2048    adamw
transformer/layer_0/attn/kv_einsum/w                   2,1,2048,256   2 x (2048 x 256)
transformer/layer_0/mlp/gating_einsum                  2,2048,16384   2 x (2048 x 16384)
transformer/layer_0/mlp/linear                         16384,2048     1 x (16384 x 2048)
transformer/layer_0/pre_attention_norm/scale           2048           adamw
# big_vision's ViT, scanned without a plural
embedding/kernel                                       16,16,3,768    adamw
pos_embedding                                          1,196,768      adamw
cls                                                    1,1,768        adamw
Transformer/encoderblock/LayerNorm_0/scale             12,768         adamw
Transformer/encoderblock/MultiHeadDotProductAttention_0/query/bias    12,12,64      adamw
head/kernel                                            768,1000       adamw
# Haiku
transformer/h0_attn/query/w                            512,512        1 x (512 x 512)
transformer/h0_attn/linear/b                           512            adamw
linear/~/w                                             8,16           1 x (8 x 16)
layer_norm/offset                                      512            adamw
conv2_d/w                                              3,3,8,16       1 x (72 x 16)
__layer_stack_no_per_layer/block/linear/w              12,512,512     12 x (512 x 512)
# state spaces
layers/mamba/A_log                                     12,1024,16     adamw
layers/mamba/dt_bias                                   12,64          adamw
layers/mamba/in_proj/kernel                            12,512,2304    adamw
layers/mamba/out_proj/kernel                           12,1024,512    12 x (1024 x 512)
layers/attn/sinks                                      12,64          adamw
# heads as axes, where the path shows the layers
layers/0/attn/q_proj/kernel                            512,8,64       1 x (512 x 512)
layers/0/attn/o_proj/kernel                            8,64,512       1 x (512 x 512)
layers/attn/q_proj/kernel                              12,512,8,64    12 x (512 x 512)
layers/attn/o_proj/kernel                              12,8,64,512    12 x (512 x 512)
layers/attn/query/kernel                               12,768,768     12 x (768 x 768)
attn/qkv/kernel                                        512,1536       1 x (512 x 1536)
# gates
mlp/gate/kernel                                        512,2048       1 x (512 x 2048)
mlp/gate/weight                                        2048,512       1 x (512 x 2048)
mlp/gate_proj/kernel                                   512,256        1 x (512 x 256)
mlp/gate/kernel                                        512,8          1 x (512 x 8)
layers/moe/gate/kernel                                 12,512,64      12 x (512 x 64)
layers/moe/router/kernel                               12,512,64      12 x (512 x 64)
layers/0/moe/shared_expert_gate/kernel                 512,1          adamw
experts/gate/kernel                                    8,512,1024     8 x (512 x 1024)
layers/moe/experts/wi                                  12,64,512,256  768 x (512 x 256)
# convolutions
Conv_0/kernel                                          3,3,16,32      1 x (144 x 32)
Conv_0/kernel                                          7,16,32        1 x (112 x 32)
Conv_0/kernel                                          1,7,16,32      1 x (112 x 32)
conv3d/kernel                                          3,3,3,8,16     1 x (216 x 16)
layers/conv/kernel                                     12,3,3,8,16    12 x (72 x 16)
layers/conv/kernel                                     12,5,8,16      12 x (40 x 16)
conv/weight                                            32,16,3,3      1 x (144 x 32)
layers/conv/weight                                     12,16,8,5      12 x (40 x 16)
Conv_0/kernel                                          3,3,1,32       adamw
mamba/conv1d/weight                                    1024,1,4       adamw
depthwise_conv/kernel                                  4,1024         adamw
conv1d/kernel                                          32,1,64        adamw
patch_embed/proj/kernel                                16,16,3,768    adamw
# adapters, scales, single rows and columns, and names without a role
layers/0/lora/b                                        8,4096         1 x (8 x 4096)
layers/ls1/gamma                                       12,512         adamw
res_scale                                              12,512         adamw
AdaLN_0/Dense_0/kernel                                 512,3072       1 x (512 x 3072)
Dense_0/kernel                                         2,512          1 x (2 x 512)
LayerNormMLP_0/scale                                   512            adamw
LayerNormMLP_0/wi_kernel                               512,2048       1 x (512 x 2048)
value/kernel                                           512,1          adamw
layers/foo/kernel                                      512,512        1 x (512 x 512)
foo                                                    16             adamw
foo                                                    1              adamw
"""

# path, shape, and readings that the error must offer.
AMBIGUITIES = """
mixer/w                             4,8,16      one matrix of 4 x 128 | 4 matrices of 8 x 16
codebook                            8,16        one matrix of 8 x 16 | no matrix
rel_pos_h                           27,64       one matrix of 27 x 64 | no matrix
gaussian_matrix                     2,128       one matrix of 2 x 128 | no matrix
0                                   8,16        one matrix of 8 x 16 | no matrix
foo/bar                             8,16        one matrix of 8 x 16 | no matrix
layers/foo                          12,512      one matrix of 12 x 512 | no matrix
layers/foo/w                        12,512      one matrix of 12 x 512 | no matrix
layers/b1                           12,2048     one matrix of 12 x 2048 | no matrix
b                                   8,16        one matrix of 8 x 16 | no matrix
w1                                  12,512,2048 12 matrices of 512 x 2048 | no matrix
decoder/q_proj/kernel               12,64,64    one matrix of 12 x 4096 | 12 matrices of 64 x 64
attn/o_proj/weight                  512,8,64    one matrix of 512 x 512 | 512 matrices of 64 x 8
attn/q_einsum/w                     8,2048,256  one matrix of 2048 x 2048 | 8 matrices of 2048 x 256
attn/qkv/kernel                     512,3,8,64  3 matrices of 512 x 512 | 3 matrices of 8 x 32768
DenseGeneral_0/kernel               12,2,4      12 matrices of 2 x 4 | one matrix of 12 x 8
decoder/layers/mlp/wi_0/kernel      64,4,256    64 matrices of 4 x 256 | 4 matrices of 64 x 256
decoder/layers/MoeBlock_0/gate/kernel  4096,32,8  32 matrices of 4096 x 8 | 8 matrices of 4096 x 32
Conv_0/kernel                       3,5,8,16    one matrix of 120 x 16 | 3 matrices of 40 x 16
layers/conv/kernel                  3,3,8,16    3 matrices of 24 x 16 | one matrix of 72 x 16
conv1d/kernel                       4,1024      one matrix of 4 x 1024 | no matrix
"""


def _lines(table):
    rows = (line.split(maxsplit=2) for line in table.splitlines() if line and line[0] != "#")
    return [(path, tuple(map(int, shape.split(","))), expected) for path, shape, expected in rows]


@pytest.mark.parametrize(("path", "shape", "expected"), _lines(READINGS))
def test_names_of_published_models_are_read_as_written_down(path, shape, expected):
    decision = classify(path, shape)
    assert not decision.interpretations
    blocks = () if decision.view is None else decision.view.bind(shape).blocks
    found = " + ".join(f"{b.batch} x ({b.rows} x {b.cols})" for b in blocks) or "adamw"
    assert found == expected
    assert decision.reason


@pytest.mark.parametrize(("path", "shape", "expected"), _lines(AMBIGUITIES))
def test_what_cannot_be_decided_offers_its_readings(path, shape, expected):
    offered = [reading.words for reading in classify(path, shape).interpretations]
    assert set(expected.split(" | ")) <= set(offered)


@pytest.mark.parametrize("scan", ["layers", "blocks", "h", "ScanBlock_0", "VmapBlock_0", "stack"])
@pytest.mark.parametrize("norm", ["norm", "LayerNorm_0", "ln_1", "RMSNorm_0", "attn_norm", "ln"])
@pytest.mark.parametrize("leaf", ["scale", "weight", "bias", "w", "gamma", "offset"])
def test_scanned_norms_never_reach_muon(scan, norm, leaf):
    assert classify(f"decoder/{scan}/{norm}/{leaf}", (12, 512)).view is None
