// The module: import { decide, loraConfig, rules } from "./advise.mjs".
import "./rules.js";
import "./advise.js";

export const { cards, decide, epochSeconds, loraConfig, loraParameters, memory, toToml, usable } = globalThis.fastloraAdvise;
export const { models, rules } = globalThis.fastloraRules;
