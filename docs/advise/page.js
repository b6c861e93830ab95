// The page: reads the controls, asks advise.js, shows what it says.
"use strict";

(() => {
  const { decide, cards, loraConfig, toToml, usable, GIB } = globalThis.fastloraAdvise;
  const { rules, models } = globalThis.fastloraRules;
  const $ = (id) => document.getElementById(id);
  const PARTS = {
    weights: "weights", adapter: "adapter, optimiser, exact sums", saved: "saved activations", working: "head, or one layer's backward",
  };
  const FORMATS = ["PEFT JSON", "run.toml", "Python", "command"];
  const state = { goal: "general", format: FORMATS[0] };

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  const gib = (bytes) => `${(bytes / GIB).toFixed(1)} GiB`;

  function duration(seconds) {
    if (seconds < 90) return `${seconds.toFixed(0)} s`;
    return seconds < 5400 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(1)} h`;
  }

  function modelOf() {
    const name = $("model").value;
    $("custom").hidden = name !== "";
    if (name !== "") return models[name];
    try {
      const read = JSON.parse($("custom").value);
      return read.facts?.model ?? read.model ?? read;
    } catch {
      return null;
    }
  }

  function dataOf() {
    const [rows, mean, longest] = ["rows", "mean", "longest"].map((id) => Math.floor(Number($(id).value)));
    if (!(rows > 0 && mean > 0 && longest > 0)) return null;
    const tokens = rows * mean;
    return {
      rows, tokens, padded: rows * Math.ceil(mean / rules.alignment) * rules.alignment, supervised: tokens, squares: tokens * mean,
      quantiles: Object.fromEntries(rules.quantiles.map((q) => [q, Math.max(mean, longest)])),
      bytes_per_token: rules.least_bytes_per_token,
    };
  }

  function written(facts, found) {
    const train = { model: "MODEL", data: "YOURS.jsonl", output: "adapter" };
    if (state.format === "PEFT JSON") return JSON.stringify({ ...loraConfig(facts, rules), ...found.lora }, null, 2);
    if (state.format === "run.toml") return toToml(found, train);
    if (state.format === "Python") {
      const literal = (v) => (typeof v === "boolean" ? (v ? "True" : "False") : JSON.stringify(v));
      const call = (name, values) => `${name}(\n${Object.entries(values).map(([k, v]) => `    ${k}=${literal(v)},\n`).join("")})\n`;
      return `from fastlora import LoraConfig, TrainConfig\n\nlora = ${call("LoraConfig", found.lora)}config = ` +
        call("TrainConfig", { ...train, ...found.train });
    }
    const words = ["fastlora train"];
    for (const [name, value] of Object.entries({ ...train, ...found.lora, ...found.train })) {
      const flag = `--${name === "r" ? "rank" : name.replaceAll("_", "-")}`;
      if (value === true) words.push(flag);
      else if (value !== false) words.push(`${flag} ${value}`);
    }
    return words.join(" \\\n  ");
  }

  function showVerdict(found, card) {
    const lines = found.verdicts.map((name) => `LoRA is the wrong tool: ${rules.verdicts[name].text}`);
    if (!found.fits) lines.push(`Does not fit: ${gib(found.memory.peak)} are needed at the least, of ${gib(usable(card, rules))} usable.`);
    const good = lines.length === 0;
    if (good) {
      const takes = found.memory === null ? "memory unknown: its layers do not run as fused kernels" : `${gib(found.memory.peak)} of ${gib(card)}`;
      lines.push(`LoRA fits: ${(found.lora_parameters / 1e6).toFixed(1)} million trained parameters at rank ${found.lora.r}, ${takes}.`);
    }
    $("verdict").className = good ? "verdict" : "verdict bad";
    $("verdict").replaceChildren(...lines.map((line) => element("p", line)));
  }

  function showMemory(parts, card) {
    const whole = Math.max(card, parts.peak);
    const pieces = Object.keys(PARTS).map((name) =>
      element("i", undefined, { class: name, style: `width:${(100 * parts[name]) / whole}%`, title: `${PARTS[name]}: ${gib(parts[name])}` }));
    const limit = element("u", undefined, { style: `left:${(100 * usable(card, rules)) / whole}%`, title: "what tensors may take" });
    $("bar").replaceChildren(...pieces, limit);
    $("legend").replaceChildren(...Object.entries(PARTS).map(([name, label]) => {
      const item = element("li");
      item.append(element("i", undefined, { class: name }), `${label} `, element("b", gib(parts[name])));
      return item;
    }));
    $("peak").textContent = `peak ${gib(parts.peak)}, of ${gib(usable(card, rules))} that tensors may take on this card`;
  }

  function showCards(facts) {
    const head = element("tr");
    for (const name of ["Card", "Rank", "Micro-batch", "Runs layers again", "Peak", "One epoch"]) head.append(element("th", name));
    const rows = cards(facts, rules).map((row) => {
      const line = element("tr", undefined, row.fits ? {} : { class: "no" });
      const epoch = !row.fits ? "does not fit" : row.seconds_per_epoch === null ? "" : duration(row.seconds_per_epoch);
      const cells = [`${row.gib} GiB (${row.card})`, row.lora.r, row.train.micro_batch_tokens,
        row.train.activation_checkpointing ? "yes" : "no", gib(row.memory.peak), epoch];
      line.append(...cells.map((text) => element("td", String(text))));
      return line;
    });
    $("cards").replaceChildren(head, ...rows);
  }

  function showReasons() {
    const cited = [...new Set(Object.values(rules.reasons).flatMap((reason) => reason.sources))];
    $("why").replaceChildren(...Object.entries(rules.reasons).flatMap(([name, reason]) => {
      const text = element("dd", `${reason.why} `);
      text.append(element("sup", reason.sources.map((s) => cited.indexOf(s) + 1).join(", ")));
      return [element("dt", name), text];
    }));
    $("sources").replaceChildren(...cited.map((name) => element("li", rules.sources[name])));
  }

  function press(box, value) {
    for (const button of $(box).children) {
      button.setAttribute(box === "tabs" ? "aria-selected" : "aria-pressed", String(button.textContent === value));
    }
  }

  function show() {
    const model = modelOf(), card = Number($("memory").value) * GIB;
    const rank = Number($("rank").value) === 0 ? null : rules.ranks[Number($("rank").value) - 1];
    $("memory-value").textContent = `${$("memory").value} GiB`;
    press("goal", state.goal);
    press("tabs", state.format);
    if (model === null || !Array.isArray(model.groups)) {
      $("verdict").className = "verdict bad";
      $("verdict").replaceChildren(element("p", "Paste the facts of your model as JSON."));
      return;
    }
    const facts = { goal: state.goal, model, data: dataOf(), card, rank, new_vocabulary: $("new").checked };
    const found = decide(facts, rules);
    $("rank-value").textContent = rank === null ? `${found.lora.r}, by the rules` : String(rank);
    showVerdict(found, card);
    for (const id of ["memory-panel", "cards-panel"]) $(id).hidden = found.memory === null;
    if (found.memory !== null) {
      showMemory(found.memory, card);
      showCards(facts);
    }
    $("config").textContent = written(facts, found);
  }

  function choices(box, names, key, role = {}) {
    $(box).append(...names.map((name) => {
      const button = element("button", name, { type: "button", ...role });
      button.addEventListener("click", () => { state[key] = name; show(); });
      return button;
    }));
  }

  for (const name of Object.keys(models)) $("model").append(element("option", name, { value: name }));
  $("model").append(element("option", "one of your own …", { value: "" }));
  $("model").value = "llama-3.1-8b";
  choices("goal", Object.keys(rules.goals), "goal");
  choices("tabs", FORMATS, "format", { role: "tab" });
  $("rank").max = String(rules.ranks.length);
  $("cards-quick").append(...rules.cards.map(({ gib: size }) => {
    const button = element("button", String(size), { type: "button", title: `${size} GiB` });
    button.addEventListener("click", () => { $("memory").value = String(size); show(); });
    return button;
  }));
  for (const id of ["model", "custom", "memory", "rank", "rows", "mean", "longest", "new"]) $(id).addEventListener("input", show);
  $("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText($("config").textContent);
    $("copy").textContent = "Copied";
    setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
  });
  showReasons();
  show();
})();
