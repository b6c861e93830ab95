// Made by python -m bench.advice_page from fastlora/advice_rules.json; change that file, not this one.
globalThis.fastloraRules = {
 "rules": {
  "goals": {
   "general": {
    "ranks": [
     16,
     32
    ],
    "without_data": 16,
    "alpha_over_rank": 1,
    "learning_rate": 0.0002,
    "batch_size": 16,
    "why": "rank 16, or 32 where the data hold more than rank 16 can: instructions, formats and style need few directions"
   },
   "domain": {
    "ranks": [
     64,
     128
    ],
    "without_data": 128,
    "alpha_over_rank": 2,
    "learning_rate": 0.0002,
    "batch_size": 16,
    "why": "rank 64, or 128 where the data hold more than rank 64 can: what full fine-tuning learns in a hard domain has a high rank"
   },
   "speed": {
    "ranks": [
     8,
     16
    ],
    "without_data": 8,
    "alpha_over_rank": 1,
    "learning_rate": 0.0002,
    "batch_size": 16,
    "why": "rank 8, or 16 where the data hold more than rank 8 can: the smallest adapter and optimiser"
   }
  },
  "ranks": [
   8,
   16,
   32,
   64,
   128,
   256
  ],
  "bits_per_parameter": 2,
  "bits_per_token": 1,
  "rslora_above": 64,
  "rslora_root": 8,
  "dropout": 0,
  "least_bytes_per_token": 2,
  "batch_sizes": [
   16,
   8,
   4
  ],
  "steps_wanted": 100,
  "epochs": [
   {
    "rows_below": 1000,
    "epochs": 3
   },
   {
    "rows_below": 5000,
    "epochs": 2
   }
  ],
  "epochs_otherwise": 1,
  "quantiles": [
   "100",
   "99.9",
   "99.5",
   "99",
   "95",
   "90",
   "50"
  ],
  "length_without_data": 2048,
  "alignment": 128,
  "head_rows": 2048,
  "ladder": [
   {
    "tokens": 16384,
    "checkpointing": 0
   },
   {
    "tokens": 8192,
    "checkpointing": 0
   },
   {
    "tokens": 4096,
    "checkpointing": 0
   },
   {
    "tokens": 2048,
    "checkpointing": 0
   },
   {
    "tokens": 8192,
    "checkpointing": 1
   },
   {
    "tokens": 4096,
    "checkpointing": 1
   },
   {
    "tokens": 2048,
    "checkpointing": 1
   },
   {
    "tokens": 1024,
    "checkpointing": 1
   },
   {
    "tokens": 512,
    "checkpointing": 1
   },
   {
    "tokens": 256,
    "checkpointing": 1
   },
   {
    "tokens": 128,
    "checkpointing": 1
   }
  ],
  "bytes_per_parameter": {
   "master": 4,
   "moments": 8,
   "exact_sum": 8
  },
  "reserved_over_peak": 1.07,
  "context_bytes": 644245094,
  "share_of_peak_rate": 0.5,
  "cards": [
   {
    "gib": 8,
    "card": "RTX 3070",
    "tflops": 40.6
   },
   {
    "gib": 12,
    "card": "RTX 4070 Ti",
    "tflops": 80.2
   },
   {
    "gib": 16,
    "card": "RTX 4080",
    "tflops": 97.5
   },
   {
    "gib": 24,
    "card": "RTX 4090",
    "tflops": 165.2
   },
   {
    "gib": 48,
    "card": "L40S",
    "tflops": 362
   },
   {
    "gib": 80,
    "card": "H100 SXM",
    "tflops": 989
   }
  ],
  "targets": [
   "q_proj",
   "k_proj",
   "v_proj",
   "o_proj",
   "gate_proj",
   "up_proj",
   "down_proj"
  ],
  "verdicts": {
   "new_vocabulary": {
    "text": "new tokens, or a language that the model does not know, are to be learnt: the embedding and the head must change, all their weights; an adapter of low rank on the projections leaves both as they are. Train all weights.",
    "sources": [
     "biderman2024",
     "rust2021"
    ]
   },
   "unknown_text": {
    "text": "the tokenizer cuts these texts into pieces of a byte or two, as it does with a language or notation it was not made for: the embedding of those pieces would have to change, and an adapter leaves it as it is. Take a model whose tokenizer knows these texts, or train all weights.",
    "sources": [
     "rust2021"
    ]
   },
   "capacity": {
    "text": "the supervised tokens hold more than even the highest rank here can take up: full fine-tuning will learn more of them than LoRA does.",
    "sources": [
     "schulman2025",
     "biderman2024"
    ]
   }
  },
  "reasons": {
   "rank": {
    "why": "by the goal, and within it by what the data hold: at about one bit a supervised token and two bits a trained parameter",
    "sources": [
     "hu2021",
     "biderman2024",
     "schulman2025",
     "allenzhu2024"
    ]
   },
   "lora_alpha": {
    "why": "r, or 2r for a domain: the scale s = alpha / r is then 1 or 2 at every rank; with rsLoRA it is what goes on from there without a jump",
    "sources": [
     "hu2021",
     "kalajdzievski2023"
    ]
   },
   "use_rslora": {
    "why": "above rank 64: s = alpha / sqrt(r) keeps the update's size where alpha / r with a fixed alpha would shrink it",
    "sources": [
     "kalajdzievski2023"
    ]
   },
   "target_modules": {
    "why": "all projections: adapters on attention alone fall short of them at the same number of parameters",
    "sources": [
     "dettmers2023",
     "biderman2024",
     "schulman2025"
    ]
   },
   "lora_dropout": {
    "why": "0: a mask costs time in every projection, and one pass over the data hardly overfits; give 0.05 where held-out loss rises",
    "sources": [
     "dettmers2023",
     "bench"
    ]
   },
   "learning_rate": {
    "why": "about ten times that of full fine-tuning, and nearly the same at every rank; halve it if the loss jumps",
    "sources": [
     "schulman2025",
     "hayou2024"
    ]
   },
   "batch_size": {
    "why": "16 sequences, fewer where one pass would be under 100 steps: LoRA suffers from large batches more than full fine-tuning does",
    "sources": [
     "schulman2025"
    ]
   },
   "epochs": {
    "why": "one pass; two or three over small files",
    "sources": [
     "biderman2024"
    ]
   },
   "max_length": {
    "why": "the longest row, or the highest quantile of the rows' lengths that fits memory and positions, padded to 128; longer rows are skipped and counted",
    "sources": [
     "data"
    ]
   },
   "micro_batch_tokens": {
    "why": "the most that fits: how a batch is cut changes time and memory, never the adapter",
    "sources": [
     "exactness"
    ]
   },
   "activation_checkpointing": {
    "why": "only where small micro-batches do not fit: every layer then runs twice",
    "sources": [
     "chen2016",
     "bench"
    ]
   }
  },
  "sources": {
   "hu2021": "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685",
   "kalajdzievski2023": "Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv:2312.03732",
   "hayou2024": "Hayou, Ghosh and Yu 2024, LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv:2402.12354",
   "dettmers2023": "Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314",
   "biderman2024": "Biderman et al. 2024, LoRA Learns Less and Forgets Less, arXiv:2405.09673",
   "schulman2025": "Schulman and Thinking Machines Lab 2025, LoRA Without Regret, thinkingmachines.ai/blog/lora",
   "allenzhu2024": "Allen-Zhu and Li 2024, Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws, arXiv:2404.05405",
   "rust2021": "Rust et al. 2021, How Good is Your Tokenizer? On the Monolingual Performance of Multilingual Language Models, arXiv:2012.15613",
   "chen2016": "Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174",
   "bench": "measured here: docs/bench.md",
   "exactness": "shown here: docs/exactness.md",
   "data": "the lengths of the data's own rows"
  }
 },
 "models": {
  "smollm2-135m": {
   "parameters": 134515008,
   "layers": 30,
   "hidden": 576,
   "vocabulary": 49152,
   "positions": 131072,
   "groups": [
    [
     576,
     [
      576,
      192,
      192
     ]
    ],
    [
     576,
     [
      576
     ]
    ],
    [
     576,
     [
      1536,
      1536
     ]
    ],
    [
     1536,
     [
      576
     ]
    ]
   ],
   "heads": 9,
   "key_heads": 3,
   "head_dim": 64,
   "head_norms": false,
   "sandwich": false,
   "fused": true
  },
  "llama-3.2-1b": {
   "parameters": 1235814400,
   "layers": 16,
   "hidden": 2048,
   "vocabulary": 128256,
   "positions": 131072,
   "groups": [
    [
     2048,
     [
      2048,
      512,
      512
     ]
    ],
    [
     2048,
     [
      2048
     ]
    ],
    [
     2048,
     [
      8192,
      8192
     ]
    ],
    [
     8192,
     [
      2048
     ]
    ]
   ],
   "heads": 32,
   "key_heads": 8,
   "head_dim": 64,
   "head_norms": false,
   "sandwich": false,
   "fused": true
  },
  "llama-3.1-8b": {
   "parameters": 8030261248,
   "layers": 32,
   "hidden": 4096,
   "vocabulary": 128256,
   "positions": 131072,
   "groups": [
    [
     4096,
     [
      4096,
      1024,
      1024
     ]
    ],
    [
     4096,
     [
      4096
     ]
    ],
    [
     4096,
     [
      14336,
      14336
     ]
    ],
    [
     14336,
     [
      4096
     ]
    ]
   ],
   "heads": 32,
   "key_heads": 8,
   "head_dim": 128,
   "head_norms": false,
   "sandwich": false,
   "fused": true
  }
 }
};
