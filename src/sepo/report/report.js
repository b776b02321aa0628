// Draws the report from the data block of this file. Every text is set as textContent, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
// A table of answers, which are no pairs, has one side.
let SIDES = ["chosen", "rejected"];
const isPairs = () => SIDES.length > 1;

// ---------------------------------------------------------------- data

/** Read the block that payload.py writes: base64, gzip, a JSON header, and arrays stored byte plane by byte plane. */
async function readData() {
  const text = atob($("data").textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const unzipped = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const raw = new Uint8Array(await new Response(unzipped).arrayBuffer());
  const size = new DataView(raw.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(raw.subarray(4, 4 + size)));
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array, float64: Float64Array };
  const arrays = {};
  for (const [name, { type, offset, length }] of Object.entries(header.arrays)) {
    const values = new kinds[type](length);
    const out = new Uint8Array(values.buffer);
    const width = values.BYTES_PER_ELEMENT;
    for (let plane = 0; plane < width; plane++) {
      const from = 4 + size + offset + plane * length;
      for (let i = 0; i < length; i++) out[i * width + plane] = raw[from + i];
    }
    arrays[name] = values;
  }
  return { ...header, arrays };
}

const starts = (lengths) => {
  const out = new Uint32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) out[i + 1] = out[i] + lengths[i];
  return out;
};

/** The number of key tokens, as in selection.py: floor(k n) with tolerance for rounding, at least 1. The `ended` tokens
 *  that end a turn are no key tokens, unless there is no other. */
const keyCount = (k, n, ended) => Math.min(Math.max(1, n - ended), Math.max(1, Math.floor(k * n + 1e-9)));

/** The rank of each token in the order of selection: highest reward first in the chosen response, lowest first in the
 *  rejected response, earlier positions first among equals. The tokens that end a turn, at the positions `ends`, are last. */
function ranks(rewards, side, ends) {
  const order = Uint32Array.from(rewards, (_, i) => i);
  const sign = side === "chosen" ? -1 : 1;
  const last = new Set(ends);
  order.sort((a, b) => last.has(a) - last.has(b) || sign * (rewards[a] - rewards[b]) || a - b);
  const rank = new Uint32Array(order.length);
  order.forEach((position, place) => { rank[position] = place; });
  return rank;
}

// ---------------------------------------------------------------- text and elements

/** Make control and format characters of foreign text visible. Newlines, tabs and the joiners inside written
 *  characters (emoji sequences, Persian words) stay. */
const plain = (text) => String(text).replace(
  /(?!(?<=[\p{L}\p{M}\p{S}])[\u200c\u200d](?=[\p{L}\p{S}]))[\p{Cc}\p{Cf}\u2028\u2029]/gu,
  (c) => (c === "\n" || c === "\t" ? c : `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`));

/** An element with properties, attributes (names with a dash, or role) and children; strings become text nodes. */
function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) element.append(child instanceof Node ? child : plain(child));
  }
  return element;
}

const integer = (x) => Math.round(x).toLocaleString("en");
const percent = (x, digits = 0) => `${(100 * x).toFixed(digits)}\u00a0%`;
const signed = (x, digits = 3) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
const minus = (text) => text.replace(/^-/, "−");

function short(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (Number.isInteger(x) && size < 1e15) return minus(x.toLocaleString("en"));
  return minus(size >= 1e-3 && size < 1e6 ? String(Number(x.toPrecision(4))) : x.toExponential(2).replace(/\.?0+e/, "e"));
}

function duration(seconds) {
  if (seconds < 60) return `${short(Number(seconds.toPrecision(3)))} s`;
  const s = Math.round(seconds);
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

// ---------------------------------------------------------------- the pairs

/** The shown text of a token: marks (between U+0001 and U+0002) become <i>, the rest is plain text. */
function fillShown(element, shown) {
  if (!shown.includes("\u0001")) {
    element.textContent = shown;
    return;
  }
  shown.split(/[\u0001\u0002]/).forEach((part, i) => {
    if (part === "") return;
    if (i % 2 === 0) element.append(part);
    else {
      // A direction is set, so that the letters of ⟨0xD7⟩ do not decide the direction of the surrounding text.
      element.append(h("i", { dir: "ltr", className: part.startsWith("⟨0x") ? "bytes" : "" }, part));
    }
  });
}

function pairsView(data) {
  const { arrays, pieces, summary } = data;
  const count = data.pair_ids.length;
  const contexts = "chosen_context_lengths" in arrays ? SIDES.map((side) => `${side}_context`) : [];
  const offsets = Object.fromEntries(["prompt", ...SIDES, ...contexts].map((name) => [name, starts(arrays[`${name}_lengths`])]));
  const slice = (name, kind, pair) => arrays[`${name}_${kind}`].subarray(offsets[name][pair], offsets[name][pair + 1]);
  const endOffsets = Object.fromEntries(SIDES.map((side) => [side, starts(arrays[`${side}_ended`])]));
  const endsOf = (side, pair) => arrays[`${side}_ends`].subarray(endOffsets[side][pair], endOffsets[side][pair + 1]);
  const length = (name, pair) => arrays[`${name}_lengths`][pair];
  const textOf = (piece) => pieces.text[piece] ?? pieces.shown[piece];
  const hasStored = "chosen_weights" in arrays;
  const hasLogps = "chosen_logps" in arrays;
  const state = { k: { ...data.k }, stored: hasStored, query: "", order: [] };
  const feed = $("feed");

  const isKey = (pair, side, position, rank) => state.stored
    ? slice(side, "weights", pair)[position] > 0
    : rank < keyCount(state.k[side], length(side, pair), arrays[`${side}_ended`][pair]);

  // Ten colour steps per sign. Rewards are heavy-tailed, so the scale gives small rewards more room than a linear scale.
  const level = (reward) => Math.round(10 * Math.min(1, Math.abs(reward) / summary.colour_limit) ** 0.75);
  const shade = (reward) => {
    const step = level(reward);
    return step === 0 ? "token" : `token ${reward > 0 ? "p" : "n"}${step}`;
  };

  // ------------------------------------------------ search

  let lowered = null;
  const searchText = [];
  const lower = (piece) => (lowered ??= pieces.shown.map((_, i) => textOf(i).toLowerCase()))[piece];
  const joined = (name, pair) => {
    let text = "";
    for (const piece of slice(name, "pieces", pair)) text += lower(piece);
    return text;
  };
  const haystack = (pair) => (searchText[pair] ??= ["prompt", ...SIDES].map((name) => joined(name, pair)));

  /** The positions of the tokens that overlap a match of the query. */
  function hits(side, pair) {
    const positions = new Set();
    if (!state.query) return positions;
    const ends = [];
    let text = "";
    for (const piece of slice(side, "pieces", pair)) {
      text += lower(piece);
      ends.push(text.length);
    }
    let token = 0;
    for (let at = text.indexOf(state.query); at >= 0; at = text.indexOf(state.query, at + 1)) {
      while (ends[token] <= at) token++;
      for (let i = token; i < ends.length && (i === 0 ? 0 : ends[i - 1]) < at + state.query.length; i++) positions.add(i);
    }
    return positions;
  }

  // ------------------------------------------------ cards, filled only near the viewport

  const cards = data.pair_ids.map((id, pair) => h("article", {
    className: "pair", id: `pair-${id}`, tabIndex: 0, "aria-label": `${isPairs() ? "Pair" : "Answer"} ${id}`, "data-pair": pair, "aria-setsize": count,
  }));
  const live = new Map(); // pair -> { ranks, spans, titles } of the filled cards, each by side
  const heights = new Map();
  let columnWidth = 0;

  function estimate(pair) {
    const narrow = columnWidth < 820;
    const perLine = Math.max(20, (narrow ? columnWidth : (columnWidth - 40) / 2) / 7.2);
    const lines = (side) => Math.ceil((length(side, pair) * 4.4) / perLine) + 1;
    const text = narrow ? SIDES.reduce((sum, side) => sum + lines(side), 2) : Math.max(...SIDES.map(lines));
    return 140 + 29 * text;
  }
  const reserve = (pair) => { cards[pair].style.minHeight = `${heights.get(pair) ?? estimate(pair)}px`; };

  function preview(pair) {
    if (data.questions) return data.questions[pair].replace(/\s+/g, " ").trim();
    const numbers = slice("prompt", "pieces", pair);
    const first = arrays.prompt_starts[pair];
    const last = arrays.prompt_ends[pair];
    const unshared = numbers.length > first + last ? numbers.subarray(first, numbers.length - last) : numbers;
    let text = "";
    for (let i = 0; i < unshared.length && text.length < 300; i++) text += textOf(unshared[i]);
    return text.replace(/\s+/g, " ").trim();
  }

  function promptOf(pair) {
    const body = h("div", { className: "text", dir: "auto" });
    const details = h("details", { className: "prompt" },
      h("summary", { dir: "auto" }, preview(pair) || "empty prompt"), body);
    const fill = () => {
      if (body.hasChildNodes()) return;
      body.textContent = plain(Array.from(slice("prompt", "pieces", pair), textOf).join(""));
    };
    details.addEventListener("toggle", fill);
    // A pair that matches the search only in its prompt shows the prompt.
    const [inPrompt, ...inResponses] = state.query ? haystack(pair).map((text) => text.includes(state.query)) : [];
    if (inPrompt && !inResponses.includes(true)) {
      fill();
      details.open = true;
    }
    return details;
  }

  function responseOf(pair, side, entry) {
    const rewards = slice(side, "rewards", pair);
    const numbers = slice(side, "pieces", pair);
    const matches = hits(side, pair);
    const spans = [];
    const nodes = [];
    entry.ranks[side] = ranks(rewards, side, endsOf(side, pair));
    // The text between the assistant's turns, by the token that it stands before.
    const context = contexts.length ? slice(`${side}_context`, "pieces", pair) : [];
    const places = contexts.length ? slice(`${side}_context`, "at", pair) : [];
    let shownContext = 0;
    rewards.forEach((reward, i) => {
      let between = "";
      for (; shownContext < context.length && places[shownContext] === i; shownContext++) between += textOf(context[shownContext]);
      if (between) nodes.push(h("span", { className: "context", title: "read, neither scored nor trained" }, between));
      const span = document.createElement("span");
      span.className = shade(reward);
      span.tabIndex = -1;
      span.dataset.i = i;
      if (matches.has(i)) span.classList.add("hit");
      // The space before a word is outside the coloured box: boxes read as words, and no box extends past a line's end.
      const shown = pieces.shown[numbers[i]];
      const spaced = shown.length > 1 && shown[0] === " ";
      fillShown(span, spaced ? shown.slice(1) : shown);
      if (spaced) nodes.push(" ");
      nodes.push(span);
      spans.push(span);
    });
    entry.spans[side] = spans;
    entry.titles[side] = h("h4");
    const label = `${side} response, ${length(side, pair)} tokens; arrow keys move between tokens, up and down between key tokens`;
    const tokens = h("div", { className: "tokens", dir: "auto", tabIndex: 0, role: "group", "aria-label": label, "data-side": side });
    tokens.append(...nodes);
    return h("section", { className: `side ${side}` }, entry.titles[side], tokens, data.other ? otherOf(pair, side) : null);
  }

  // The same response under the oracle's tokenizer, where the policy has another tokenizer.
  const otherOffsets = data.other && Object.fromEntries(SIDES.map((side) => [side, starts(arrays[`other_${side}_lengths`])]));

  function otherOf(pair, side) {
    const [from, to] = [otherOffsets[side][pair], otherOffsets[side][pair + 1]];
    const label = `${side} response in the oracle's tokens, ${to - from} tokens`;
    const tokens = h("div", { className: "tokens", dir: "auto", role: "group", "aria-label": label });
    let sum = 0;
    for (let i = from; i < to; i++) {
      const [piece, reward] = [arrays[`other_${side}_pieces`][i], arrays[`other_${side}_rewards`][i]];
      const shown = data.other.shown[piece];
      const spaced = shown.length > 1 && shown[0] === " ";
      const span = h("span", { className: shade(reward).replace("token", "piece"), title: `${data.other.label[piece]}  ${signed(reward)}` });
      fillShown(span, spaced ? shown.slice(1) : shown);
      if (spaced) tokens.append(" ");
      tokens.append(span);
      sum += reward;
    }
    const title = h("h5", {}, `Oracle's tokens: ${integer(to - from)} · sum ${signed(sum, 2)}`);
    return h("div", { className: "other" }, title, tokens);
  }

  function fill(pair) {
    if (live.has(pair)) return;
    const entry = { ranks: {}, spans: {}, titles: {} };
    const margin = arrays.margins[pair];
    const tags = Object.entries(data.facets).map(([name, facet]) =>
      h("span", { className: "tag" }, `${name}: ${facet.values[facet.codes[pair]] || "none"}`));
    cards[pair].replaceChildren(
      h("header", {},
        h("h3", {}, `${isPairs() ? "Pair" : "Answer"} ${data.pair_ids[pair]}`),
        isPairs() ? h("span", { className: "margin" }, `margin ${signed(margin, 2)}`) : null,
        isPairs() && margin <= 0 ? h("span", { className: "wrong" }, "oracle wrong") : null,
        tags),
      promptOf(pair),
      h("div", { className: "sides" }, SIDES.map((side) => responseOf(pair, side, entry))),
    );
    cards[pair].style.minHeight = "";
    live.set(pair, entry);
    mark(pair);
  }

  function empty(pair) {
    if (!live.has(pair) || cards[pair].contains(document.activeElement)) return;
    heights.set(pair, cards[pair].offsetHeight);
    reserve(pair);
    live.delete(pair);
    cards[pair].replaceChildren();
  }

  /** Mark the key tokens of a filled card. */
  function mark(pair) {
    const entry = live.get(pair);
    for (const side of SIDES) {
      let keys = 0;
      let sum = 0;
      const rewards = slice(side, "rewards", pair);
      entry.spans[side].forEach((span, i) => {
        const key = isKey(pair, side, i, entry.ranks[side][i]);
        span.classList.toggle("key", key);
        keys += key;
        sum += rewards[i];
      });
      const name = h("b", {}, !isPairs() ? "Response" : side === "chosen" ? "Chosen" : "Rejected");
      entry.titles[side].replaceChildren(name, `  ${integer(rewards.length)} tokens · ${integer(keys)} key · sum ${signed(sum, 2)}`);
    }
  }

  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) (isIntersecting ? fill : empty)(Number(target.dataset.pair));
  }, { rootMargin: "1200px 0px" });

  // ------------------------------------------------ selection rates

  const stored = hasStored ? SIDES.map((side) => arrays[`${side}_weights`].reduce((n, weight) => n + (weight > 0), 0)) : null;

  function showRates() {
    let keys = 0;
    let tokens = 0;
    SIDES.forEach((side, s) => {
      let sideTokens = 0;
      let selected = 0;
      arrays[`${side}_lengths`].forEach((n, pair) => {
        sideTokens += n;
        selected += keyCount(state.k[side], n, arrays[`${side}_ended`][pair]);
      });
      if (state.stored) selected = stored[s];
      keys += selected;
      tokens += sideTokens;
      const share = state.stored ? selected / Math.max(1, sideTokens) : state.k[side];
      $(`k-${side}-value`).textContent = percent(share, Math.abs(share * 100 - Math.round(share * 100)) < 1e-6 ? 0 : 1);
    });
    $("key-count").replaceChildren(`${integer(keys)} `, h("span", { className: "token key" }, "key tokens"), ` · ${percent(keys / Math.max(1, tokens), 1)}`);
    $("stored").checked = state.stored;
    for (const pair of live.keys()) mark(pair);
  }

  let frame = 0;
  const scheduleRates = () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(showRates);
  };
  for (const side of SIDES) {
    const slider = $(`k-${side}`);
    slider.value = state.k[side];
    slider.addEventListener("input", () => {
      state.k[side] = Number(slider.value);
      state.stored = false;
      scheduleRates();
    });
  }
  if (!isPairs()) {
    for (const id of ["k-rejected", "verdict", "longer"]) $(id).closest("label").hidden = true;
    $("k-chosen").closest("label").querySelector(".side-name").textContent = "Key tokens";
    $("tab-pairs").textContent = "Answers";
    feed.setAttribute("aria-label", "Answers");
    feed.classList.add("alone");
    for (const [value, text] of [["margin-down", "largest sum"], ["margin-up", "smallest sum"]]) {
      $("sort").querySelector(`[value=${value}]`).textContent = text;
    }
  }
  $("stored-switch").hidden = !hasStored;
  $("stored").addEventListener("change", (event) => {
    state.stored = event.target.checked;
    scheduleRates();
  });
  $("fade").addEventListener("change", (event) => feed.classList.toggle("fade", event.target.checked));
  $("other-switch").hidden = !data.other;
  $("other").addEventListener("change", (event) => {
    feed.classList.toggle("both", event.target.checked);
    heights.clear();
  });

  // ------------------------------------------------ filters and order

  const facetFields = Object.entries(data.facets).map(([name, facet]) => {
    const select = h("select", { "data-facet": name }, h("option", { value: "" }, "any"),
      facet.values.map((value, i) => h("option", { value: String(i) }, value || "none")));
    return { facet, select, field: h("label", { className: "field" }, name, select) };
  });
  $("fields").lastElementChild.before(...facetFields.map(({ field }) => field));
  const inputs = [...$("fields").querySelectorAll("input, select")];
  const filters = inputs.filter((input) => input.id !== "sort");

  /** The pairs that pass the filters, in table order. */
  function matching() {
    const [verdict, which, shortest, longest] = ["verdict", "longer", "shortest", "longest"].map((id) => $(id).value);
    const wanted = facetFields.filter(({ select }) => select.value).map(({ facet, select }) => [facet.codes, Number(select.value)]);
    return data.pair_ids.map((_, pair) => pair).filter((pair) => {
      const [chosen, rejected = 0] = SIDES.map((side) => length(side, pair));
      const longer = Math.max(chosen, rejected);
      if (verdict && (arrays.margins[pair] <= 0) !== (verdict === "wrong")) return false;
      if (which && (which === "chosen" ? chosen <= rejected : rejected <= chosen)) return false;
      if (shortest && longer < Number(shortest)) return false;
      if (longest && longer > Number(longest)) return false;
      if (wanted.some(([codes, code]) => codes[pair] !== code)) return false;
      return !state.query || haystack(pair).some((text) => text.includes(state.query));
    });
  }

  const total = (pair) => SIDES.reduce((sum, side) => sum + length(side, pair), 0);
  const comparisons = {
    "original": (a, b) => a - b,
    "margin-down": (a, b) => arrays.margins[b] - arrays.margins[a] || a - b,
    "margin-up": (a, b) => arrays.margins[a] - arrays.margins[b] || a - b,
    "length-down": (a, b) => total(b) - total(a) || a - b,
    "length-up": (a, b) => total(a) - total(b) || a - b,
  };

  function arrange() {
    const query = $("search").value.toLowerCase();
    const changed = query !== state.query;
    state.query = query;
    state.order = matching().sort(comparisons[$("sort").value]);
    observer.disconnect();
    if (changed) { // redraw filled cards, because matches are outlined
      live.clear();
      cards.forEach((card) => card.replaceChildren());
    }
    for (const pair of live.keys()) empty(pair);
    columnWidth = feed.clientWidth;
    state.order.forEach((pair, i) => {
      cards[pair].setAttribute("aria-posinset", i + 1);
      cards[pair].setAttribute("aria-setsize", state.order.length);
      if (!live.has(pair)) reserve(pair);
    });
    feed.replaceChildren(...state.order.map((pair) => cards[pair]));
    state.order.slice(0, 3).forEach(fill); // immediately, so that the first frame is not blank
    state.order.forEach((pair) => observer.observe(cards[pair]));
    const shown = count < summary.pairs ? ` shown here, of ${integer(summary.pairs)} in the table` : "";
    $("count").textContent = state.order.length === count
      ? `${integer(count)} ${isPairs() ? "pairs" : "answers"}${shown}`
      : `${integer(state.order.length)} of ${integer(count)} ${isPairs() ? "pairs" : "answers"}${state.order.length ? "" : ": nothing matches"}`;
    $("clear").hidden = filters.every((input) => input.value === "");
  }

  let wait = 0;
  for (const input of inputs) {
    input.addEventListener("input", () => {
      clearTimeout(wait);
      wait = setTimeout(arrange, input.tagName === "INPUT" ? 150 : 0);
    });
  }
  $("clear").addEventListener("click", () => {
    for (const input of filters) input.value = "";
    arrange();
    $("search").focus();
  });

  // ------------------------------------------------ hover, focus, keys

  const tooltip = $("tooltip");

  function place(span) {
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
    tooltip.hidden = false;
    tooltip.style.left = "0px"; // measure its natural width, not the width that its last position left
    const { width, height } = tooltip.getBoundingClientRect();
    const right = document.documentElement.clientWidth;
    const below = box.bottom + 8 + height <= innerHeight || box.top < height + 8;
    tooltip.style.left = `${Math.max(8, Math.min(box.left, right - width - 8))}px`;
    tooltip.style.top = `${below ? box.bottom + 8 : box.top - height - 8}px`;
  }

  function describe(span) {
    const pair = Number(span.closest(".pair").dataset.pair);
    const side = span.parentElement.dataset.side;
    const i = Number(span.dataset.i);
    const entry = live.get(pair);
    const piece = slice(side, "pieces", pair)[i];
    const reward = slice(side, "rewards", pair)[i];
    const n = length(side, pair);
    const rank = entry.ranks[side][i];
    const rows = [
      ["reward", signed(reward, Math.abs(reward) < 0.01 ? 5 : 3)],
      ["rank", `${integer(rank + 1)} of ${integer(n)}, ${side === "chosen" ? "highest" : "lowest"} first`],
    ];
    if (hasLogps) {
      const raw = slice(side, "logps", pair)[i];
      if (raw !== 65535) {
        const logp = -raw / data.logp_scale;
        const show = (value) => `${minus(value.toFixed(3))}  (${percent(Math.exp(Math.min(0, value)), 2)})`;
        rows.push(["log p, reference", show(logp)], ["log p, oracle", show(logp + reward)]);
      }
    }
    if (state.stored) {
      const weight = slice(side, "weights", pair)[i];
      if (weight > 0 && weight !== 1) rows.push(["weight", short(weight)]);
    }
    rows.push(["position", `${integer(i + 1)} of ${integer(n)}`], ["token id", String(pieces.id[piece])]);
    const key = isKey(pair, side, i, rank) ? h("span", { className: "key" }, "key token") : null;
    tooltip.replaceChildren(
      h("div", { className: "label" }, pieces.label[piece] || "(empty)", key),
      h("dl", {}, rows.map(([term, value]) => [h("dt", {}, term), h("dd", {}, value)])),
    );
    place(span);
  }

  const hide = () => { tooltip.hidden = true; };
  const tokenOf = (event) => event.target.closest?.(".token");
  feed.addEventListener("pointerover", (event) => {
    const span = tokenOf(event);
    if (span) describe(span);
  });
  feed.addEventListener("pointerout", (event) => {
    if (tokenOf(event) && document.activeElement !== tokenOf(event)) hide();
  });
  feed.addEventListener("focusin", (event) => {
    const span = tokenOf(event);
    if (!span) return;
    span.setAttribute("aria-describedby", "tooltip");
    describe(span);
  });
  feed.addEventListener("focusout", (event) => {
    tokenOf(event)?.removeAttribute("aria-describedby");
    hide();
  });
  addEventListener("scroll", () => {
    const span = document.activeElement?.closest?.(".token");
    if (span && !tooltip.hidden) place(span);
    else hide();
  }, { passive: true });

  feed.addEventListener("keydown", (event) => {
    const card = event.target.closest(".pair");
    if (!card || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") hide();
    if (event.key === "PageDown" || event.key === "PageUp") {
      const next = event.key === "PageDown" ? card.nextElementSibling : card.previousElementSibling;
      if (next) {
        next.focus({ preventScroll: true });
        next.scrollIntoView({ block: "start" });
        event.preventDefault();
      }
      return;
    }
    const tokens = event.target.closest(".tokens");
    if (!tokens) return;
    const spans = live.get(Number(card.dataset.pair)).spans[tokens.dataset.side];
    const at = tokenOf(event) ? Number(event.target.dataset.i) : -1;
    const rightToLeft = getComputedStyle(tokens).direction === "rtl";
    const key = rightToLeft ? { ArrowLeft: "ArrowRight", ArrowRight: "ArrowLeft" }[event.key] ?? event.key : event.key;
    const isKeySpan = (span) => span.classList.contains("key");
    const target = {
      ArrowRight: () => spans[at + 1],
      ArrowLeft: () => spans[at - 1],
      ArrowDown: () => spans.slice(at + 1).find(isKeySpan),
      ArrowUp: () => spans.slice(0, Math.max(0, at)).findLast(isKeySpan),
      Home: () => spans[0],
      End: () => spans.at(-1),
    }[key];
    if (!target) return;
    target()?.focus();
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });

  // ------------------------------------------------ legend

  const scale = h("div", { className: "scale" });
  for (let step = -10; step <= 10; step++) scale.append(h("span", { className: step ? `${step > 0 ? "p" : "n"}${Math.abs(step)}` : "" }));
  const limit = summary.colour_limit;
  const tick = (x) => signed(x, limit < 0.1 ? 3 : 2);
  $("legend").append(scale, h("div", { className: "ticks" },
    h("span", {}, `${tick(-limit)} less likely`), h("span", {}, "0"), h("span", {}, `more likely ${tick(limit)}`)));
  $("legend").setAttribute("aria-label",
    `A token's colour is its reward, from orange (${tick(-limit)} and less: less likely under the oracle than under the reference) ` +
    `to blue (${tick(limit)} and more: more likely). Key tokens are underlined.`);

  // ------------------------------------------------ start

  if (matchMedia("(max-width: 860px)").matches) $("filters").open = false;
  let width = 0;
  new ResizeObserver(() => {
    if (feed.clientWidth === 0 || feed.clientWidth === width) return;
    width = columnWidth = feed.clientWidth;
    heights.clear();
    state.order.forEach((pair) => { if (!live.has(pair)) reserve(pair); });
  }).observe(feed);
  arrange();
  showRates();
}

// ---------------------------------------------------------------- charts

/** The computed colours of the page's theme, or of the theme `scheme`. */
function colours(scheme) {
  const probe = h("span");
  if (scheme) probe.style.colorScheme = scheme;
  document.body.append(probe);
  const computed = {};
  for (const name of ["paper", "ink", "muted", "rule", "accent", "chosen", "rejected", "positive", "negative"]) {
    probe.style.color = `var(--${name})`;
    computed[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return computed;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function niceTicks(low, high, wanted) {
  const span = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => span / s <= wanted);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

/**
 * Draw a chart at a width: scales, ticks and the SVG. Every colour is written out, so that the page and the exported
 * file share one drawing.
 *
 * spec: { title, xLabel, yLabel, x: {log2, format, read, low, high}, y: {log10, format, read, low, high}, guides: [{x|y, label}],
 *         series: [{name, colour, dash, x, y, low, high, edges}] }
 */
function drawChart(spec, width, colour, background) {
  const small = width < 460;
  const height = Math.round(Math.min(340, Math.max(220, width * 0.58)));
  const known = (values) => values.filter((v) => v !== null && Number.isFinite(v));
  const xs = spec.series.flatMap((s) => s.edges ?? s.x);
  const ys = known(spec.series.flatMap((s) => [...s.y, ...(s.low ?? []), ...(s.high ?? [])]));
  let [yLow, yHigh] = [spec.y.low ?? Math.min(...ys), spec.y.high ?? Math.max(...ys)];
  if (yLow === yHigh) [yLow, yHigh] = [yLow - (Math.abs(yLow) || 1) * 0.1, yHigh + (Math.abs(yHigh) || 1) * 0.1];
  else {
    const room = (yHigh - yLow) * 0.05;
    if (spec.y.low === undefined) yLow -= room;
    if (spec.y.high === undefined) yHigh += room;
  }
  let [xLow, xHigh] = [spec.x.low ?? Math.min(...xs), spec.x.high ?? Math.max(...xs)];
  if (xLow === xHigh) [xLow, xHigh] = [xLow - 0.5, xHigh + 0.5];
  if (spec.y.log10) {
    const positive = ys.filter((y) => y > 0);
    [yLow, yHigh] = [10 ** Math.floor(Math.log10(Math.min(...positive))), Math.max(...positive) * 1.3];
  }
  const yTicks = spec.y.log10
    ? Array.from({ length: 12 }, (_, i) => 10 ** (i - 10)).filter((t) => t >= yLow * 0.999 && t <= yHigh)
    : niceTicks(yLow, yHigh, 5);
  const formatY = spec.y.format ?? short;
  const formatX = spec.x.format ?? short;
  const left = 12 + Math.max(...yTicks.map((t) => formatY(t).length)) * 7;
  const top = spec.series.length > 1 ? 46 : spec.yLabel ? 24 : 10;
  const box = { left, right: width - 22, top, bottom: height - 42 };
  const mapX = spec.x.log2 ? Math.log2 : (x) => x;
  const px = (x) => box.left + ((mapX(x) - mapX(xLow)) / (mapX(xHigh) - mapX(xLow))) * (box.right - box.left);
  const mapY = spec.y.log10 ? (y) => Math.log10(Math.max(y, yLow)) : (y) => y;
  const py = (y) => box.bottom - ((mapY(y) - mapY(yLow)) / (mapY(yHigh) - mapY(yLow))) * (box.bottom - box.top);
  const xTicks = spec.x.log2
    ? Array.from({ length: 40 }, (_, i) => 2 ** i).filter((t) => t >= xLow && t <= xHigh)
    : niceTicks(xLow, xHigh, small ? 4 : 7);
  const font = { "font-family": "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif", "font-size": 12 };
  const text = (content, attributes) => {
    const element = svg("text", { fill: colour.muted, ...font, ...attributes });
    element.textContent = plain(content);
    return element;
  };
  const root = svg("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  if (background) root.append(svg("rect", { width, height, fill: background }));

  for (const t of yTicks) {
    root.append(svg("line", { x1: box.left, x2: box.right, y1: py(t), y2: py(t), stroke: colour.rule }));
    root.append(text(formatY(t), { x: box.left - 8, y: py(t) + 4, "text-anchor": "end" }));
  }
  if (yLow < 0 && yHigh > 0) root.append(svg("line", { x1: box.left, x2: box.right, y1: py(0), y2: py(0), stroke: colour.muted, "stroke-width": 0.8 }));
  for (const t of xTicks) root.append(text(formatX(t), { x: px(t), y: box.bottom + 18, "text-anchor": "middle" }));
  root.append(text(spec.xLabel, { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }));
  root.append(text(spec.yLabel, { x: 0, y: 12 }));

  const inside = (guide) => (guide.y !== undefined ? guide.y >= yLow && guide.y <= yHigh : guide.x >= xLow && guide.x <= xHigh);
  for (const guide of (spec.guides ?? []).filter(inside)) {
    const across = guide.y !== undefined;
    root.append(svg("line", {
      x1: across ? box.left : px(guide.x), x2: across ? box.right : px(guide.x),
      y1: across ? py(guide.y) : box.top, y2: across ? py(guide.y) : box.bottom, stroke: colour.muted, "stroke-dasharray": "2 3",
    }));
    if (guide.label) {
      root.append(text(guide.label, across
        ? { x: box.right, y: py(guide.y) - 5, "text-anchor": "end" }
        : { x: px(guide.x) + 6, y: box.bottom - 8 }));
    }
  }

  let legend = box.left;
  for (const series of spec.series) {
    const stroke = colour[series.colour];
    const points = series.x.map((x, i) => [x, series.y[i], i]).filter(([, y]) => y !== null && Number.isFinite(y));
    if (points.length === 0) continue;
    const path = (pairs) => pairs.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
    if (series.low) {
      const known = points.filter(([, , i]) => series.low[i] !== null && series.high[i] !== null); // one prompt has no interval
      const edge = [...known.map(([x, , i]) => [x, series.high[i]]), ...known.map(([x, , i]) => [x, series.low[i]]).reverse()];
      if (known.length) root.append(svg("path", { d: `${path(edge)}Z`, fill: stroke, "fill-opacity": 0.14 }));
    }
    // A histogram is drawn as stairs over its bins.
    const line = series.edges ? points.flatMap(([, y, i]) => [[series.edges[i], y], [series.edges[i + 1], y]]) : points;
    if (series.edges) {
      const foot = [[series.edges.at(-1), yLow], [series.edges[0], yLow]];
      root.append(svg("path", { d: `${path([...line, ...foot])}Z`, fill: stroke, "fill-opacity": 0.12 }));
    }
    root.append(svg("path", {
      d: path(line), fill: "none", stroke, "stroke-width": 1.8, "stroke-linejoin": "round", ...(series.dash ? { "stroke-dasharray": series.dash } : {}),
    }));
    if (points.length < 40 && !series.edges && !series.low) {
      for (const [x, y] of points) root.append(svg("circle", { cx: px(x), cy: py(y), r: points.length < 15 ? 2.6 : 1.6, fill: stroke }));
    }
    if (spec.series.length > 1) {
      root.append(svg("line", { x1: legend, x2: legend + 22, y1: 30, y2: 30, stroke, "stroke-width": 2, ...(series.dash ? { "stroke-dasharray": series.dash } : {}) }));
      root.append(text(series.name, { x: legend + 28, y: 34, fill: colour.ink }));
      legend += 28 + series.name.length * 6.6 + 20;
    }
  }
  return { root, box, px };
}

function download(name, blob) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function svgFile(spec) {
  const light = colours("light");
  const { root } = drawChart(spec, 720, light, "#ffffff");
  return new Blob([new XMLSerializer().serializeToString(root)], { type: "image/svg+xml" });
}

async function pngFile(spec) {
  const image = new Image();
  image.src = URL.createObjectURL(svgFile(spec));
  await image.decode();
  const canvas = h("canvas", { width: image.naturalWidth * 2, height: image.naturalHeight * 2 });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  URL.revokeObjectURL(image.src);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

const redraws = new Set();

/** A figure: heading, caption, the values under the pointer (or arrow keys), drawing, export buttons. */
function figure(spec) {
  const plot = h("div", { className: "plot" });
  const readout = h("output", { className: "readout muted" });
  const file = spec.file ?? spec.title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  const exports = h("div", { className: "exports" },
    h("button", { type: "button", className: "quiet", "aria-label": `${spec.title} as SVG`, onclick: () => download(`${file}.svg`, svgFile(spec)) }, "SVG"),
    h("button", { type: "button", className: "quiet", "aria-label": `${spec.title} as PNG`, onclick: async () => download(`${file}.png`, await pngFile(spec)) }, "PNG"));
  const xs = [...new Set(spec.series.flatMap((s) => s.x))].sort((a, b) => a - b);
  const formatX = spec.x.read ?? spec.x.format ?? short;
  const formatY = spec.y.read ?? spec.y.format ?? short;
  let drawn = null;
  let at = -1;

  function point(index) {
    at = index;
    drawn.root.querySelector(".cursor")?.remove();
    if (index < 0) {
      readout.textContent = "";
      return;
    }
    const x = xs[index];
    drawn.root.append(svg("line", { class: "cursor", x1: drawn.px(x), x2: drawn.px(x), y1: drawn.box.top, y2: drawn.box.bottom, stroke: drawn.colour.ink, "stroke-width": 0.8 }));
    const values = spec.series.map((s) => [s, s.y[s.x.indexOf(x)]]).filter(([, y]) => y !== undefined && y !== null);
    readout.textContent = plain(`${spec.xLabel} ${formatX(x)}: ` + values.map(([s, y]) => `${spec.series.length > 1 ? `${s.name} ` : ""}${formatY(y)}`).join(" · "));
  }

  function draw() {
    const width = plot.clientWidth;
    if (!width) return;
    const colour = colours();
    drawn = { ...drawChart(spec, width, colour), colour };
    drawn.root.setAttribute("tabindex", 0);
    drawn.root.setAttribute("aria-label", `${spec.title}. ${spec.caption ?? ""} Arrow keys read the values.`);
    drawn.root.addEventListener("pointermove", (event) => {
      const x = event.clientX - drawn.root.getBoundingClientRect().left;
      let best = 0;
      xs.forEach((value, i) => { if (Math.abs(drawn.px(value) - x) < Math.abs(drawn.px(xs[best]) - x)) best = i; });
      point(best);
    });
    drawn.root.addEventListener("pointerleave", () => point(-1));
    drawn.root.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      point(Math.max(0, Math.min(xs.length - 1, at + move)));
      event.preventDefault();
    });
    plot.replaceChildren(drawn.root);
  }
  new ResizeObserver(draw).observe(plot);
  redraws.add(draw);
  const caption = spec.caption ? h("figcaption", {}, spec.caption) : null;
  return h("figure", { className: "chart" }, h("h3", {}, spec.title), caption, readout, plot, exports);
}

const SIDE_STYLE = { chosen: { colour: "chosen" }, rejected: { colour: "rejected", dash: "6 3" } };
const midpoints = (edges) => edges.slice(1).map((edge, i) => (edge + edges[i]) / 2);

function figuresView(data) {
  const { summary } = data;
  const whole = (x) => percent(x);
  const charts = [];
  if (summary.cumulative) {
    const { share, share_for_80: for80 } = summary.cumulative;
    charts.push(figure({
      title: "Cumulative share of reward", file: "cumulative-share",
      caption: `Share of Σ|s| carried by the tokens with the largest |s|, averaged over responses. ${percent(for80)} of the tokens carry 80\u00a0%.`,
      xLabel: "Share of tokens", yLabel: "Share of Σ|s|",
      x: { low: 0, high: 1, format: whole }, y: { low: 0, high: 1, format: whole, read: (y) => percent(y, 1) },
      guides: [{ y: 0.8 }, { x: for80 }],
      series: SIDES.filter((side) => summary.cumulative[side]).map((side) => ({ name: side, ...SIDE_STYLE[side], x: share, y: summary.cumulative[side] })),
    }));
  }
  charts.push(figure({
    title: "Distribution of token rewards", file: "token-rewards",
    caption: "Share of the tokens of each side by reward, on a logarithmic scale; the outermost 1\u00a0% is not drawn.",
    xLabel: "Token reward s", yLabel: "Share of tokens", x: { format: short }, y: { log10: true, format: (y) => `${short(Number((100 * y).toPrecision(3)))}\u00a0%`, read: (y) => percent(y, 2) },
    guides: [{ x: 0 }],
    series: SIDES.map((side) => ({ name: side, ...SIDE_STYLE[side], edges: summary.rewards.edges, x: midpoints(summary.rewards.edges), y: summary.rewards[side] })),
  }));
  charts.push(figure({
    title: "Reward by position", file: "reward-by-position",
    caption: "Mean token reward by position in the response (1 is the first token), with the 95 % interval of the mean, clustered by prompt.",
    xLabel: "Position", yLabel: "Mean reward s", x: { log2: true, format: short, read: (x) => integer(x) }, y: { format: short },
    series: SIDES.map((side) => ({
      name: side, ...SIDE_STYLE[side], x: summary.positions.position, y: summary.positions[side].mean, low: summary.positions[side].low, high: summary.positions[side].high,
    })),
  }));
  if (isPairs()) charts.push(figure({
    title: "Margins of the pairs", file: "pair-margins",
    caption: `Summed reward of the chosen response minus that of the rejected one. The oracle ranks ${percent(summary.accuracy, 1)} of these ${tableSide(data.documents)} pairs right (margin above 0). The outermost 1\u00a0% is not drawn.`,
    xLabel: "Margin", yLabel: "Share of pairs", x: { format: short }, y: { low: 0, format: (y) => percent(y, y && y < 0.01 ? 1 : 0), read: (y) => percent(y, 2) },
    guides: [{ x: 0 }],
    series: [{ name: "pairs", colour: "accent", edges: summary.margins.edges, x: midpoints(summary.margins.edges), y: summary.margins.pairs }],
  }));
  $("figures").append(h("section", { className: "group" },
    h("h2", {}, "Token rewards"),
    h("p", { className: "muted" }, `${summary.figure_pairs < summary.pairs ? `${integer(summary.figure_pairs)} evenly spaced ${isPairs() ? "pairs" : "answers"} of ${integer(summary.pairs)}` : `All ${integer(summary.pairs)} ${isPairs() ? "pairs" : "answers"} of the table`}. A token's reward is s = log p(oracle) − log p(reference).`),
    h("div", { className: "charts" }, charts)));

  const seriesStyle = (name) => ({
    ...(SIDE_STYLE[name.split(",")[0]] ?? { colour: "accent" }),
    ...(name.includes("evaluation") ? { dash: "2 3", colour: name === "evaluation" ? "ink" : name.split(",")[0] } : {}),
  });
  for (const { model, charts: curves } of data.documents.training ?? []) {
    $("figures").append(h("section", { className: "group" },
      h("h2", {}, `Training of the ${model}`),
      h("div", { className: "charts small" }, curves.map((curve) => figure({
        title: words(curve.name), file: `${model}-${curve.name.replace(/[^a-z0-9]+/gi, "-")}`,
        xLabel: "Step", yLabel: "", x: { format: short }, y: { format: short },
        series: curve.series.map((s) => ({ name: s.name, ...seriesStyle(s.name), x: s.step, y: s.value })),
      })))));
  }
}

// ---------------------------------------------------------------- the run

const WORDS = {
  acc: "accuracy", auc: "AUC", bpb: "bits per byte", chosen_logps: "chosen log-probability", cpu: "CPU", dpo: "DPO", eval: "evaluation", gb: "GB", gpu: "GPU", grad_norm: "gradient norm",
  gt: "gold", id: "ID", ipo: "IPO", k: "k", kl: "KL", logp: "log-probability", logps: "log-probabilities", lr: "learning rate", mem: "memory", num: "number of", ood: "OOD",
  ppl: "perplexity", ref: "reference", rrhf: "RRHF", sepo: "SePO", sft: "SFT", simpo: "SimPO", std: "standard deviation", tdpo: "TDPO", vs: "vs",
};

/** A readable label for a key: `policy/win_rate` -> "Policy · win rate". */
function words(key) {
  const label = String(key).split(/[/.]/).map((part) => WORDS[part.toLowerCase()]
    ?? part.split(/[_\s]+/).map((word) => WORDS[word.toLowerCase()] ?? word).join(" ")).join(" · ");
  return label.charAt(0).toUpperCase() + label.slice(1);
}

const isRecord = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isScalar = (value) => value === null || typeof value !== "object";

function scalar(key, value) {
  if (typeof value === "number") {
    if (/(^|[_/.])(seconds|runtime|elapsed)($|[_/.])/i.test(key)) return duration(value);
    const isShare = /(^|[_/.])(accuracy|accuracies|rate|share|fraction|finished)($|[_/.])/i.test(key) && !/learning_rate/i.test(key);
    if (isShare && value >= 0 && value <= 1) return percent(value, 1);
    return short(value);
  }
  if (typeof value === "boolean") return value ? "yes" : "no";
  return value === null ? "–" : String(value);
}

const isSimple = (value) => isScalar(value) || (Array.isArray(value) && value.every(isScalar));
const simple = (key, value) => (Array.isArray(value) ? value.map((item) => scalar(key, item)).join(", ") : scalar(key, value)) || "–";

/** The simple values inside a value, each with its path: {a: {b: 1}} -> [["a.b", 1]]. */
function leaves(value, path = "") {
  if (isSimple(value)) return [[path, value]];
  return Object.entries(value).flatMap(([key, item]) => leaves(item, path ? `${path}.${key}` : key));
}

const row = (head, ...cells) => h("tr", {}, h("th", { scope: "row" }, head), cells);
const table = (columns, rows, className = "") => h("div", { className: "scroll" }, h("table", { className },
  columns.length ? h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col", className: name === "Key" ? "raw" : "" }, name)))) : null, h("tbody", {}, rows)));

/** Many lines in one cell: closed until they are asked for, so that a row stays one screen high. */
const folded = (lines) => (lines.length <= 3 ? lines : h("details", {}, h("summary", {}, `${integer(lines.length)} values`), lines));

/** Any JSON value as a table: records of records get a row per record and a column per key (a block per record where the screen is narrow), others key and value. */
function describeValue(key, value) {
  if (isSimple(value)) return h("p", {}, simple(key, value));
  const entries = Array.isArray(value) ? value.map((item, i) => [String(i + 1), item]) : Object.entries(value);
  if (entries.length === 0) return h("p", { className: "muted" }, "–");
  const name = (word) => (/version|package/i.test(key) || Array.isArray(value) ? word : words(word));
  const cell = (column, item) => h("td", { "data-label": words(column) }, item === undefined ? "" : isSimple(item) ? simple(column, item)
    : folded(leaves(item).map(([path, leaf]) => h("div", {}, h("span", { className: "muted" }, `${words(path)}: `), simple(path, leaf)))));
  const columns = [...new Set(entries.flatMap(([, item]) => (isRecord(item) ? Object.keys(item) : [])))];
  if (entries.length > 1 && columns.length <= 8 && entries.every(([, item]) => isRecord(item) && Object.values(item).some(isSimple))) {
    return table(["", ...columns.map(words)], entries.map(([word, item]) => row(name(word), columns.map((column) => cell(column, item[column])))), "records");
  }
  return table([], entries.map(([word, item]) => row(name(word), isSimple(item) ? cell(word, item) : h("td", {}, describeValue(word, item)))));
}

/** Metrics with readable labels; a standard error (`_se`) is beside its value. */
function metricsTable(metrics) {
  const entries = Object.entries(metrics).filter(([key]) => !(key.endsWith("_se") && key.slice(0, -3) in metrics));
  return table(["Metric", "Value", "Key"], entries.map(([key, value]) => {
    const error = metrics[`${key}_se`];
    const spread = error === 0 ? " no spread seen" : ` ± ${scalar(key, error)}`;
    return row(words(key), h("td", { className: "number" }, scalar(key, value), error === undefined || error === null ? null : h("small", {}, spread)),
      h("td", { className: "raw" }, key));
  }));
}

function runView({ documents }) {
  const section = (title, ...content) => $("run").append(h("section", { className: "document" }, h("h2", {}, title), ...content));
  const filled = (value) => value !== null && value !== undefined && (isScalar(value) || Object.keys(value).length > 0);
  const { metrics, manifest } = documents;
  if (filled(metrics)) {
    const isFlat = isRecord(metrics) && Object.values(metrics).every(isScalar);
    section("Evaluation", isFlat ? metricsTable(metrics) : describeValue("metrics", metrics));
  }
  if (filled(manifest)) {
    const nested = isRecord(manifest) ? Object.entries(manifest).filter(([, value]) => !isSimple(value)) : [["", manifest]];
    const single = isRecord(manifest) ? Object.fromEntries(Object.entries(manifest).filter(([, value]) => isSimple(value))) : {};
    section("Manifest", filled(single) ? describeValue("manifest", single) : null,
      h("div", { className: "parts" }, nested.map(([key, value]) => h("div", {}, h("h3", {}, words(key)), describeValue(key, value)))));
  }
  if (filled(documents.recipe)) section("Recipe", h("pre", { tabIndex: 0 }, documents.recipe));
  section("Score table", filled(documents.table) ? describeValue("table", documents.table) : h("p", { className: "muted" }, "The table holds no provenance."));
}

// ---------------------------------------------------------------- answers before and after

/** The answers of the run's two models to the held-out prompts, with gold rewards and verdicts of the judge. */
function answersView({ answers }) {
  if (!answers) return;
  $("tab-answers").hidden = false;
  const has = (name) => name in answers;
  const change = (i) => (has("policy_gold") && answers.policy_gold[i] !== null && answers.base_gold[i] !== null
    ? answers.policy_gold[i] - answers.base_gold[i] : null);
  const lean = (i) => (has("preference") && answers.preference[i] !== null ? answers.preference[i] - 1.5 : null);
  const verdict = (x) => (x === null ? "none" : x > 0 ? "after" : x < 0 ? "before" : "tie");
  const field = (id, label, options) => h("label", { className: "field" }, label,
    h("select", { id }, options.map(([value, text]) => h("option", { value }, text))));
  const sides = [["", "any"], ["after", "after"], ["before", "before"], ["tie", "neither"], ["none", "no verdict"]];
  const orders = [["original", "original order"]];
  if (has("policy_gold")) orders.push(["gold-down", "largest gain of gold reward"], ["gold-up", "largest loss of gold reward"]);
  if (has("preference")) orders.push(["judge-down", "judge's preference: after first"], ["judge-up", "judge's preference: before first"]);
  if (has("policy_kl")) orders.push(["kl-down", "largest KL from the start"]);
  const search = h("input", { type: "search", id: "answers-search", placeholder: "in prompts and answers", autocomplete: "off" });
  const fields = h("div", { className: "fields" },
    h("label", { className: "field wide" }, "Search", search),
    has("policy_gold") ? field("answers-gold", "Higher gold reward", sides) : null,
    has("preference") ? field("answers-judge", "Judge prefers", sides) : null,
    field("answers-sort", "Sort by", orders));
  const count = h("output", { id: "answers-count" });
  const list = h("div", { id: "answers-list" });

  const number = (name, i) => (has(name) && answers[name][i] !== null ? short(Number(answers[name][i].toPrecision(3))) : null);
  const side = (name, title, i) => {
    const notes = [["gold", number(`${name}_gold`, i)], ["score", number(`${name}_score`, i)],
      ["KL", name === "policy" ? number("policy_kl", i) : null]].filter(([, value]) => value !== null);
    if (answers.limit && has(`${name}_tokens`) && answers[`${name}_tokens`][i] >= answers.limit) notes.push(["cut off at", `${integer(answers.limit)} tokens`]);
    return h("section", { className: "side" },
      h("h4", {}, h("b", {}, title), notes.map(([what, value]) => `  ·  ${what} ${value}`)),
      h("div", { className: "tokens", dir: "auto" }, answers[name][i] || h("span", { className: "muted" }, "(empty)")));
  };
  const cards = answers.prompt.map((prompt, i) => {
    const judged = verdict(lean(i));
    const tag = !has("preference") ? null : { after: "judge: after", before: "judge: before", tie: "judge: neither", none: "judge: no verdict" }[judged];
    return h("article", { className: "pair answer", "data-row": i },
      h("header", {}, h("h3", {}, `Answer ${i + 1}`), tag ? h("span", { className: judged === "before" ? "wrong" : "tag" }, tag) : null),
      h("div", { className: "asked", dir: "auto" }, prompt),
      h("div", { className: "sides" }, side("base", "Before", i), side("policy", "After", i)));
  });
  const texts = answers.prompt.map((prompt, i) => [prompt, answers.base[i], answers.policy[i]].join("\n").toLowerCase());

  // Rows without a value come last in either order.
  const by = (value, sign) => (a, b) => {
    const [x, y] = [value(a), value(b)];
    return (x === null) - (y === null) || sign * ((x ?? 0) - (y ?? 0)) || a - b;
  };
  const comparisons = {
    "original": (a, b) => a - b, "gold-down": by(change, -1), "gold-up": by(change, 1),
    "judge-down": by(lean, -1), "judge-up": by(lean, 1), "kl-down": by((i) => answers.policy_kl[i], -1),
  };
  const value = (id) => document.getElementById(id)?.value ?? "";
  function arrangeAnswers() {
    const query = search.value.toLowerCase();
    const [gold, judge] = [value("answers-gold"), value("answers-judge")];
    const rows = cards.map((_, i) => i).filter((i) => (!gold || verdict(change(i)) === gold)
      && (!judge || verdict(lean(i)) === judge) && texts[i].includes(query));
    rows.sort(comparisons[value("answers-sort") || "original"]);
    list.replaceChildren(...rows.map((i) => cards[i]));
    const part = cards.length < answers.total ? ` (shown here, of ${integer(answers.total)} in the run)` : "";
    count.textContent = `${rows.length === cards.length ? "" : `${integer(rows.length)} of `}${integer(cards.length)} answers${part}`;
  }
  const sampled = answers.temperature === undefined ? "" : ` at temperature ${short(answers.temperature)}`;
  const explained = `Answers to held-out prompts before and after training, sampled${sampled}.${answers.limit ? ` An answer is cut off at ${integer(answers.limit)} tokens.` : ""}${has("policy_kl") ? " KL is log p(after) − log p(before) of the answer, in nats: the mean over answers estimates the distance from the start, and a single answer may be below 0." : ""}`;
  $("answers").append(h("p", { className: "muted", id: "answers-explained" }, explained),
    h("div", { className: "filters" }, fields), h("p", { className: "count" }, count), list);
  for (const input of fields.querySelectorAll("input, select")) input.addEventListener("input", arrangeAnswers);
  arrangeAnswers();
}

// ---------------------------------------------------------------- page

function tabs() {
  const all = [...document.querySelectorAll("[role=tab]")];
  const select = (tab) => {
    for (const each of all) {
      each.setAttribute("aria-selected", each === tab);
      each.tabIndex = each === tab ? 0 : -1;
      $(each.getAttribute("aria-controls")).hidden = each !== tab;
    }
  };
  all.forEach((tab) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const visible = all.filter((each) => !each.hidden);
      const next = visible[(visible.indexOf(tab) + step + visible.length) % visible.length];
      select(next);
      next.focus();
      event.preventDefault();
    });
  });
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const show = () => {
    $("theme").textContent = isDark() ? "Light theme" : "Dark theme";
    for (const draw of redraws) draw();
  };
  $("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  dark.addEventListener("change", show);
  show();
}

/** "training" or "held-out", where the table or its run says so. */
function tableSide(documents) {
  const side = documents?.table?.split?.side ?? (documents?.metrics ? "train" : "");
  return { train: "training", held_out: "held-out" }[side] ?? "";
}

function facts({ summary, documents }) {
  const heldOut = documents?.metrics?.["oracle/accuracy"];
  const rows = [
    [isPairs() ? "preference pairs" : "answers", integer(summary.pairs)],
    ["response tokens", integer(summary.tokens)],
    ...(typeof heldOut === "number" ? [["of held-out pairs ranked right by the oracle", percent(heldOut, 1)]] : []),
    ...(isPairs() ? [["of pairs have the longer response chosen", percent(summary.chosen_longer, 1)]] : []),
  ];
  if (summary.cumulative) rows.push(["of the tokens carry 80 % of the reward", percent(summary.cumulative.share_for_80)]);
  // The oracle may have been trained on the pairs of the table: their accuracy is no result.
  if (isPairs()) rows.push([`of the ${tableSide(documents)} pairs below ranked right by the oracle`, percent(summary.accuracy, 1), "minor"]);
  $("facts").append(...rows.map(([term, value, className = ""]) => h("div", { className }, h("dt", {}, term), h("dd", {}, value))));
}

async function main() {
  $("loading").textContent = "Reading the data …";
  tabs();
  let data;
  try {
    data = await readData();
  } catch (error) {
    $("loading").textContent = `The data in this file cannot be read (${error.message}); the file may be truncated, or the browser is older than 2024.`;
    return;
  }
  $("title").textContent = plain(data.title);
  SIDES = data.sides;
  pairsView(data);
  if (data.single_pair) document.documentElement.dataset.singlePair = "true"; // in a notebook: the style hides the rest
  else {
    facts(data);
    answersView(data);
    figuresView(data);
    runView(data);
  }
  theme();
  $("loading").remove();
  document.documentElement.dataset.ready = "true";
}

main();
