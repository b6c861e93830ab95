// Advice on a LoRA run: the interpreter of fastlora/advice_rules.json that fastlora/advise.py is, for browsers and node.
//
// A classic script, so that a page opened from a file can load it; advise.mjs makes a module of it. Every size is a whole number below
// 2^53 and every product is taken in the order of the Python, so both give the same numbers to the last bit.
"use strict";

globalThis.fastloraAdvise = (() => {
  const GIB = 2 ** 30;
  const HALF = 2, SINGLE = 4, LEAST_RANK = 16;
  const sum = (values) => values.reduce((a, b) => a + b, 0);

  // Memory: fastlora/advice_memory.py ------------------------------------------------------------------------

  const padded = (rank) => Math.max(LEAST_RANK, 2 ** Math.ceil(Math.log2(rank)));
  const columns = (count, rank) => padded(count * padded(rank));

  const loraParameters = (model, rank) =>
    model.layers * rank * sum(model.groups.map(([inner, widths]) => widths.length * inner + sum(widths)));

  function adapterBytes(model, rank, rules, size = HALF) {
    const copies = sum(model.groups.map(([inner, widths]) => columns(widths.length, rank) * (inner + sum(widths))));
    return loraParameters(model, rank) * sum(Object.values(rules.bytes_per_parameter)) + model.layers * copies * size;
  }

  function keptAToken(model, rank, size = HALF) {
    const [[, qkv], [out], [, gateUp]] = model.groups;
    let wide = sum(qkv) + out + model.hidden + sum(gateUp) + sum(model.groups.map(([, widths]) => columns(widths.length, rank)));
    let narrow = model.heads + 2;
    if (model.head_norms) {
      wide += (model.heads + model.key_heads) * model.head_dim;
      narrow += model.heads + model.key_heads;
    }
    if (model.sandwich) {
      wide += 2 * model.hidden;
      narrow += 2;
    }
    return wide * size + narrow * SINGLE;
  }

  function memory(model, rank, tokens, checkpointing, rules, size = HALF) {
    const row = model.hidden * size;
    const kept = keptAToken(model, rank, size);
    const again = checkpointing ? Math.ceil(model.layers / checkpointing) : 0;
    const saved = tokens * (model.layers * row + (model.layers - again) * kept);
    const gateUp = sum(model.groups[2][1]), down = model.groups[3][0];
    const layer = tokens * ((gateUp + 2 * down) * size + 2 * row + (checkpointing ? kept : 0));
    const head = Math.min(rules.head_rows, tokens) * (model.vocabulary * size + 2 * row) + tokens * 4 * row;
    const parts = {
      weights: model.parameters * size, adapter: adapterBytes(model, rank, rules, size), saved, working: Math.max(layer, head),
    };
    return { ...parts, peak: sum(Object.values(parts)) };
  }

  const usable = (card, rules) => Math.floor((card - rules.context_bytes) / rules.reserved_over_peak);

  function epochSeconds(model, data, rank, checkpointing, tflops, rules) {
    const linear = sum(model.groups.map(([inner, widths]) => inner * sum(widths))) * model.layers;
    const attention = 2 * (model.heads * model.head_dim * model.layers) * data.squares;
    const forward = 2 * linear * data.padded + attention;
    const again = checkpointing ? forward / checkpointing : 0;
    const backward = 2 * linear * data.padded + 2.5 * attention;
    const head = 4 * (model.vocabulary * model.hidden) * data.supervised;
    const adapter = 6 * loraParameters(model, rank) * data.padded;
    return (forward + again + backward + head + adapter) / (tflops * 1e12 * rules.share_of_peak_rate);
  }

  // Decisions: fastlora/advise.py ----------------------------------------------------------------------------

  function rankOf(goal, model, data, rules) {
    if (!data) return goal.without_data;
    const bits = data.supervised * rules.bits_per_token;
    const found = goal.ranks.find((rank) => loraParameters(model, rank) * rules.bits_per_parameter >= bits);
    return found ?? goal.ranks.at(-1);
  }

  const paddedLength = (length, rules) => Math.ceil(length / rules.alignment) * rules.alignment;

  function lengthsOf(model, data, rules) {
    if (!data) return [Math.min(rules.length_without_data, model.positions)];
    const found = rules.quantiles.map((q) => Math.min(paddedLength(data.quantiles[q], rules), model.positions));
    return [...new Set(found)];
  }

  function batchOf(goal, data, rules) {
    if (!data) return [goal.batch_size, rules.epochs_otherwise];
    const sizes = rules.batch_sizes.filter((size) => size <= goal.batch_size);
    const batch = sizes.find((size) => data.rows >= size * rules.steps_wanted) ?? sizes.at(-1);
    const epochs = rules.epochs.find((entry) => data.rows < entry.rows_below)?.epochs ?? rules.epochs_otherwise;
    return [batch, epochs];
  }

  function fitting(facts, wanted, lengths, batch, rules) {
    const { model, card } = facts;
    const room = card === null || !model.fused ? null : usable(card, rules);
    const smaller = facts.rank ? [] : rules.ranks.filter((rank) => rank < wanted).reverse();
    let last;
    for (const length of lengths) {
      const row = paddedLength(length, rules);
      for (const rank of [wanted, ...smaller]) {
        for (const step of rules.ladder) {
          const micro = Math.max(step.tokens, row);
          const parts = memory(model, rank, Math.min(micro, batch * row), step.checkpointing, rules);
          last = { rank, length, micro, checkpointing: step.checkpointing, parts };
          if (room === null || parts.peak <= room) return { ...last, fits: true };
        }
      }
    }
    return { ...last, fits: false };
  }

  function verdictsOf(facts, rules) {
    const { data } = facts;
    const found = [];
    if (facts.new_vocabulary) found.push("new_vocabulary");
    if (data && data.bytes_per_token < rules.least_bytes_per_token) found.push("unknown_text");
    if (data) {
      const most = loraParameters(facts.model, rules.ranks.at(-1)) * rules.bits_per_parameter;
      if (data.supervised * rules.bits_per_token > most) found.push("capacity");
    }
    return found;
  }

  // What the rules say of facts {goal, model, data, card, rank, new_vocabulary}; data, card and rank may be null.
  function decide(facts, rules) {
    const { model, data } = facts;
    const goal = rules.goals[facts.goal];
    const wanted = facts.rank || rankOf(goal, model, data, rules);
    const [batch, epochs] = batchOf(goal, data, rules);
    const chosen = fitting(facts, wanted, lengthsOf(model, data, rules), batch, rules);
    const stabilised = chosen.rank > rules.rslora_above;
    return {
      lora: {
        r: chosen.rank, lora_alpha: goal.alpha_over_rank * (stabilised ? rules.rslora_root : chosen.rank),
        lora_dropout: rules.dropout, use_rslora: stabilised,
      },
      train: {
        learning_rate: goal.learning_rate, batch_size: batch, epochs, max_length: chosen.length,
        on_long_row: data && chosen.length < data.quantiles["100"] ? "skip" : "refuse",
        micro_batch_tokens: chosen.micro, activation_checkpointing: chosen.checkpointing,
      },
      verdicts: verdictsOf(facts, rules), fits: chosen.fits, lora_parameters: loraParameters(model, chosen.rank),
      memory: model.fused ? chosen.parts : null,
    };
  }

  // A row a card of the table, as fastlora.advise.cards.
  function cards(facts, rules) {
    return rules.cards.map(({ gib, card, tflops }) => {
      const found = decide({ ...facts, card: gib * GIB }, rules);
      const known = facts.data && found.fits;
      const seconds = known
        ? epochSeconds(facts.model, facts.data, found.lora.r, found.train.activation_checkpointing, tflops, rules) : null;
      return { gib, card, seconds_per_epoch: seconds, ...found };
    });
  }

  // The LoRA configuration object with PEFT's field names, as adapter_config.json has it.
  function loraConfig(facts, rules) {
    return {
      peft_type: "LORA", task_type: "CAUSAL_LM", bias: "none", ...decide(facts, rules).lora, target_modules: rules.targets,
    };
  }

  // The file that `fastlora train --config` reads.
  function toToml(found, places = {}) {
    const value = (v) => (typeof v === "string" ? JSON.stringify(v) : String(v));
    const table = (name, values) => `[${name}]\n${Object.entries(values).map(([k, v]) => `${k} = ${value(v)}\n`).join("")}`;
    return `${table("train", { ...places, ...found.train })}\n${table("lora", found.lora)}`;
  }

  return { GIB, decide, cards, loraConfig, memory, usable, epochSeconds, loraParameters, toToml };
})();
