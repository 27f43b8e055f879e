"""Readings that a rule of one leaf gets wrong: all are decided, and as written here.

A line is a path, a shape, and what is right, as in data/trees.txt: `-` for the fallback, or the
axes of rows and columns.
"""

import pytest
from readings import read_trees, score

TREES = read_trees(
    """
= LoRA of qwix and tunix beside einsums
embedder/input_embedding                  1000,64    -
layers/#/norm/w                           64         -
layers/#/attn/q_proj/w                    64,4,16    0|1,2
layers/#/attn/q_proj/w_lora_a             64,8       0|1
layers/#/attn/q_proj/w_lora_b             8,4,16     0|1,2
layers/#/attn/o_proj/w                    4,16,64    0,1|2
layers/#/attn/o_proj/w_lora_a             4,16,8     0,1|2
layers/#/attn/o_proj/w_lora_b             8,64       0|1
layers/#/mlp/gate_proj/kernel             64,128     0|1
layers/#/mlp/gate_proj/kernel_lora_a      64,8       0|1
layers/#/mlp/gate_proj/kernel_lora_b      8,128      0|1

= the same, when only the adapters are trained
layers/#/attn/q_proj/w_lora_a             64,8       0|1
layers/#/attn/q_proj/w_lora_b             8,4,16     0|1,2
layers/#/attn/kv_einsum/w_lora_a          64,8       0|1
layers/#/attn/kv_einsum/w_lora_b          8,2,4,16   0|1,2,3
layers/#/attn/o_proj/w_lora_a             4,16,8     0,1|2
layers/#/attn/o_proj/w_lora_b             8,64       0|1

= the same in a scan
layers/attn/q_proj/w_lora_a               12,64,8    1|2
layers/attn/q_proj/w_lora_b               12,8,4,16  1|2,3
layers/attn/o_proj/w_lora_a               12,4,16,8  1,2|3
layers/attn/o_proj/w_lora_b               12,8,64    1|2

= LoRA of a convolution
Conv_0/kernel                             3,3,32,64  0,1,2|3
Conv_0/kernel_lora_a                      3,3,32,8   0,1,2|3
Conv_0/kernel_lora_b                      1,1,8,64   2|3
Conv_1/kernel                             3,3,64,32  0,1,2|3
Conv_1/kernel_lora_a                      3,3,64,8   0,1,2|3
Conv_1/kernel_lora_b                      1,1,8,32   2|3

= pairs of LoRA [d, r], [r, n, h]
layers/#/attn/q/lora_a                    64,8       0|1
layers/#/attn/q/lora_b                    8,4,16     0|1,2
layers/#/attn/q/kernel                    64,4,16    0|1,2
layers/#/attn/o/kernel                    4,16,64    0,1|2
layers/#/norm/scale                       64         -

= nnx.Einsum, heads in front
layers/#/attn/q_einsum/w                  4,64,16    1|0,2
layers/#/attn/kv_einsum/w                 2,1,64,16  2|3
layers/#/attn/attn_vec_einsum/w           4,16,64    0,1|2
layers/#/norm/scale                       64         -

= nnx.Einsum, the width in front
layers/#/attn/q_einsum/kernel             64,4,16    0|1,2
layers/#/attn/kv_einsum/kernel            2,4,64,16  2|1,3
layers/#/attn/o_einsum/kernel             4,16,64    0,1|2
layers/#/norm/scale                       64         -

= attention of a second transformer that is called an expert
action_expert/layers_#/attn/query/kernel  1024,8,256   0|1,2
action_expert/layers_#/attn/key/kernel    1024,1,256   0|2
action_expert/layers_#/attn/out/kernel    8,256,1024   0,1|2
action_expert/layers_#/norm/scale         1024         -

= layers along axis 1: outputs of attention, norms, shared experts
embed/embedding                             1000,64     -
decoder/layers/attn/query/kernel            64,6,4,16   0|2,3
decoder/layers/attn/out/kernel              4,6,16,64   0,2|3
decoder/layers/norm/scale                   64,6        -
decoder/layers/moe/router/kernel            64,6,8      0|2
decoder/layers/moe/wi_0                     8,6,64,32   2|3
decoder/layers/moe/wo                       8,6,32,64   2|3
decoder/layers/shared_experts/wi_0/kernel   64,6,128    0|2
decoder/layers/shared_experts/wo/kernel     128,6,64    0|2

= a stack of one layer
layers/attn/q_proj/kernel                   1,64,64    1|2
layers/mlp/up_proj/kernel                   1,64,256   1|2
layers/mlp/down_proj/kernel                 1,256,64   1|2
layers/norm/scale                           1,64       -

= three and four axes below ffw
layers/#/ffw/w_gate                         64,256     0|1
layers/#/ffw/w_down                         256,64     0|1
layers/#/ffw/we_gate                        8,64,32    1|2
layers/#/ffw/we_down                        8,32,64    1|2
layers/#/ffw/w_router                       64,8       0|1
layers/#/norm/scale                         64         -

= a head called logitdense
embed/embedding                             1000,64    -
blocks_#/mlp/Dense_0/kernel                 64,256     0|1
blocks_#/mlp/Dense_1/kernel                 256,64     0|1
blocks_#/LayerNorm_0/scale                  64         -
logitdense/kernel                           64,1000    -

= a head called Dense_0, at the root
conv_init/kernel                            7,7,3,64   0,1,2|3
Block_#/Conv_0/kernel                       3,3,64,64  0,1,2|3
Block_#/BatchNorm_0/scale                   64         -
Dense_0/kernel                              64,10      -

= a head called fc
conv1/kernel                                7,7,3,64   0,1,2|3
layer1/#/conv1/kernel                       3,3,64,64  0,1,2|3
layer1/#/bn1/scale                          64         -
fc/kernel                                   64,10      -

= a head called linear
embed/embeddings                            1000,64    -
block_#/linear/w                            64,256     0|1
block_#/linear_1/w                          256,64     0|1
block_#/layer_norm/scale                    64         -
linear/w                                    64,1000    -
"""
)


@pytest.mark.parametrize("name", TREES)
def test_each_of_these_is_decided_rightly(name):
    assert score(TREES[name]) == ([], [])
