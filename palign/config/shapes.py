"""Sizes of published models, for the recipes that are planned for pods: `model=dict(**LLAMA3_8B)`.

From the models' own `config.json`; `vocab_size` is the embedding's rows there.
"""

LLAMA3 = dict(
    vocab_size=128256,
    vocab_multiple=128,
    head_dim=128,
    num_key_heads=8,
    norm_epsilon=1e-5,
    rope_bases=(500000.0,),
    rope_scalings=(dict(factor=8.0, original_length=8192, low_frequency_factor=1.0, high_frequency_factor=4.0),),
    tie_embedding=False,
)
LLAMA3_8B = dict(**LLAMA3, num_layers=32, dim=4096, num_heads=32, hidden_dim=14336)  # 3.1: 8.03 B parameters
LLAMA3_70B = dict(**LLAMA3, num_layers=80, dim=8192, num_heads=64, hidden_dim=28672)  # 3.1: 70.6 B

LLAMA2_13B = dict(
    vocab_size=32000,
    num_layers=40,
    dim=5120,
    num_heads=40,
    num_key_heads=40,
    hidden_dim=13824,
    norm_epsilon=1e-5,
    tie_embedding=False,
)

QWEN25 = dict(
    vocab_size=151936,
    vocab_multiple=128,
    num_key_heads=2,
    rope_bases=(1000000.0,),
    attention_bias=True,  # on query, key and value
    tie_embedding=True,
)
QWEN25_0_5B = dict(**QWEN25, num_layers=24, dim=896, num_heads=14, hidden_dim=4864)  # 0.49 B
QWEN25_1_5B = dict(**QWEN25, num_layers=28, dim=1536, num_heads=12, hidden_dim=8960)  # 1.54 B
