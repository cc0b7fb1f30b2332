"use strict";
// All nodes are made from text (never from markup), so nothing a model wrote can run or restyle the page.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const section = (title, hint, ...children) =>
  el("section", {}, el("div", { class: "section-head" }, el("h2", {}, title), hint && el("span", { class: "hint" }, hint)), ...children);

const percent = (v) => `${(100 * v).toFixed(1)}%`;
const plain = (v) => {
  const size = Math.abs(v);
  if (size === 0) return "0";
  if (size >= 1000) return Math.round(v).toLocaleString("en");
  if (size < 0.001) return v.toExponential(1);
  return String(Number(v.toPrecision(3)));
};
const compact = (v) => (v < 1e5 ? v.toLocaleString("en") : new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(v));
const seconds = (v) => `${plain(v)} s`;

// ---- header ----

function hero() {
  const v = data.verdict;
  const gain = v.avg_at_k && typeof v.avg_at_k.after === "number" ? v.avg_at_k : null;
  const title = gain
    ? el("h1", {}, el("span", { class: "measure" }, `Held-out accuracy, mean of ${gain.k} samples for each problem (avg@${gain.k})`),
        el("span", { class: "from" }, `${percent(gain.before)} \u2192 `), percent(gain.after))
    : el("h1", {}, v.headline);
  const greedy = v.greedy && typeof v.greedy.before === "number" && typeof v.greedy.after === "number" ? v.greedy : null;
  const tiles = [
    ["Steps", v.finished ? v.steps.toLocaleString("en") : `${v.steps} of ${v.planned}`],
    greedy && ["Greedy accuracy", `${percent(greedy.before)} \u2192 ${percent(greedy.after)}`],
    ["Teacher tokens, in / out", `${compact(v.teacher_tokens.read)} / ${compact(v.teacher_tokens.written)}`],
    ["Teacher requests", v.teacher_requests.toLocaleString("en")],
    ["Teacher cost", v.cost === "$?" ? "price unknown" : v.cost],
    v.seconds && ["Training time", v.seconds],
  ].filter(Boolean);
  return el("header", { class: "hero card" },
    el("div", { class: "eyebrow" }, "omniopd run", el("strong", {}, data.name),
      el("span", { class: v.finished ? "chip good" : "chip bad" }, v.finished ? "finished" : "unfinished")),
    el("div", { class: "hero-body" }, el("div", { class: "hero-words" }, title, el("p", { class: "detail" }, v.detail)),
      gain && gain.ci95 && interval(gain)),
    el("div", { class: "tiles" }, tiles.map(([name, value]) => el("div", { class: "tile" }, el("span", {}, name), el("b", {}, value)))));
}

function interval(gain) {
  const [low, high] = gain.ci95.map((v) => 100 * v);
  const mid = 100 * gain.gain;
  const reach = [Math.min(0, low), Math.max(0, high)];
  const pad = 0.12 * (reach[1] - reach[0] || 1);
  const x = (v) => 14 + (292 * (v - reach[0] + pad)) / (reach[1] - reach[0] + 2 * pad);
  const tone = low > 0 ? "var(--good)" : high < 0 ? "var(--bad)" : "var(--soft)";
  const label = (v, text, y) => svg("text", { x: x(v), y, "text-anchor": "middle" }, text);
  return el("div", { class: "interval" }, svg("svg", { viewBox: "0 0 320 74", role: "img", "aria-label": "gain with its 95% interval" },
    svg("line", { x1: 14, x2: 306, y1: 38, y2: 38, class: "grid" }),
    svg("line", { x1: x(0), x2: x(0), y1: 20, y2: 56, stroke: "var(--faint)" }),
    svg("line", { x1: x(low), x2: x(high), y1: 38, y2: 38, stroke: tone, "stroke-width": 7, "stroke-linecap": "round", opacity: 0.3 }),
    svg("circle", { cx: x(mid), cy: 38, r: 5.5, fill: tone }),
    label(0, "no change", 70),
    svg("text", { x: x(mid), y: 17, "text-anchor": "middle", style: { fill: "var(--ink)", "font-weight": "620", "font-size": "13px" } },
      `${mid >= 0 ? "+" : "\u2212"}${Math.abs(mid).toFixed(1)} points`)));
}

// ---- charts ----

const COLORS = ["var(--accent)", "var(--accent-2)", "var(--accent-3)", "var(--accent-4)", "var(--accent-5)"];
const WIDTH = 360, HEIGHT = 178, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 22;
const SMOOTH_FROM = 20;
const cursors = [];

function niceTicks(low, high, wanted) {
  const span = high - low || Math.abs(high) || 1;
  const raw = span / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= raw);
  const ticks = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) ticks.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return ticks;
}

function movingAverage(points, size) {
  return points.map(([x], i) => {
    const window = points.slice(Math.max(0, i - size + 1), i + 1);
    return [x, window.reduce((sum, p) => sum + p[1], 0) / window.length];
  });
}

const path = (points, x, y) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");

// series: [{name, points: [[step, value]], low/high: [[step, value]] or none}]
function chart({ title, series, format = plain, zero = false, stacked = false, dots = false, smooth = false, note = () => "" }) {
  series = series.filter((s) => s.points.length);
  if (!series.length) return null;
  const xs = series.flatMap((s) => s.points.map((p) => p[0]));
  const drawn = stacked ? stack(series) : series;
  const ys = drawn.flatMap((s) => [...s.points, ...(s.low || []), ...(s.high || [])].map((p) => p[1]));
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (zero || stacked) low = Math.min(0, low);
  const pad = 0.08 * (high - low) || 0.05 * Math.abs(high) || 0.5;
  high += pad;
  if (low !== 0) low = low > 0 && low - pad < 0 ? 0 : low - pad;
  const x = (v) => LEFT + ((WIDTH - LEFT - RIGHT) * (v - x0)) / (x1 - x0 || 1);
  const y = (v) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * (v - low)) / (high - low);
  const color = (s) => s.color || COLORS[series.indexOf(s) % COLORS.length];

  const tickText = (v, ticks) => {
    const scale = format === percent ? 100 : 1;
    const step = scale * (ticks.length > 1 ? ticks[1] - ticks[0] : Math.abs(v) || 1);
    if (step < 1e-4) return v.toExponential(1);
    // As many digits as the step between ticks needs: 0.25 needs two, 50 none.
    const digits = [0, 1, 2, 3, 4, 5].find((d) => Math.abs(step * 10 ** d - Math.round(step * 10 ** d)) < 1e-6) ?? 5;
    return (scale * v).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) + (scale > 1 ? "%" : "");
  };
  const readout = el("output", {});
  const keys = el("div", { class: "keys" });
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  const levels = niceTicks(low, high, 4);
  for (const tick of levels) {
    picture.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick), class: "grid" }),
      svg("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick, levels)));
  }
  for (const tick of niceTicks(x0, x1, 4).filter((t) => Number.isInteger(t))) {
    picture.append(svg("text", { x: x(tick), y: HEIGHT - 6, "text-anchor": "middle" }, tick.toLocaleString("en")));
  }
  drawn.forEach((s, i) => {
    const tone = color(series[i]);
    if (stacked) {
      const area = path(s.points, x, y) + path([...s.base].reverse(), x, y).replace("M", "L") + "Z";
      picture.append(svg("path", { d: area, fill: tone, opacity: 0.8 }));
      return;
    }
    if (s.low && s.low.length > 1) {
      picture.append(svg("path", { d: path(s.high, x, y) + path([...s.low].reverse(), x, y).replace("M", "L") + "Z", fill: tone, opacity: 0.15 }));
    }
    const window = Math.max(2, Math.round(s.points.length / 15));
    const softened = smooth && s.points.length >= SMOOTH_FROM;
    picture.append(svg("path", { d: path(s.points, x, y), fill: "none", stroke: tone, "stroke-width": softened ? 1 : 2,
      opacity: softened ? 0.4 : 1, "stroke-linejoin": "round", "stroke-linecap": "round" }));
    if (softened) {
      picture.append(svg("path", { d: path(movingAverage(s.points, window), x, y), fill: "none", stroke: tone, "stroke-width": 2.2,
        "stroke-linejoin": "round" }));
    }
    if (dots || s.points.length === 1) {
      for (const p of s.points) picture.append(svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 3.2, fill: tone }));
    }
    if (s.low && s.low.length) {
      s.low.forEach((p, j) => picture.append(svg("line", { x1: x(p[0]), x2: x(p[0]), y1: y(p[1]), y2: y(s.high[j][1]), stroke: tone, "stroke-width": 1.5 })));
    }
  });
  const cursor = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" });
  picture.append(cursor, svg("rect", { x: LEFT, y: 0, width: WIDTH - LEFT - RIGHT, height: HEIGHT, fill: "transparent" }));

  const nearest = (points, step) => points.reduce((best, p) => (Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best));
  const show = (step) => {
    const at = nearest(series[0].points, step === null ? x1 : step)[0];
    const near = series.map((s) => s.points.find((p) => p[0] === at));
    readout.textContent = series.length === 1 && near[0] ? `${format(near[0][1])}  \u00b7  step ${at}` : `step ${at} ${note(at)}`;
    if (series.length > 1) {
      keys.replaceChildren(...series.map((s, i) =>
        el("span", {}, el("i", { style: { background: color(s) } }), near[i] ? `${s.name} ${format(near[i][1])}` : s.name)));
    }
    cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    cursor.setAttribute("x1", x(at));
    cursor.setAttribute("x2", x(at));
  };
  show(null);
  cursors.push(show);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const share = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    const step = x0 + Math.min(1, Math.max(0, share)) * (x1 - x0);
    for (const other of cursors) other(step);
  });
  picture.addEventListener("pointerleave", () => cursors.forEach((other) => other(null)));
  return el("div", { class: "chart card" }, el("div", { class: "chart-head" }, el("h3", {}, title), readout), picture, series.length > 1 && keys);
}

// Every series lies on the ones before it; a step without a value counts as nothing spent there.
function stack(series) {
  const steps = [...new Set(series.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
  let base = steps.map((step) => [step, 0]);
  return series.map((s) => {
    const values = new Map(s.points);
    const points = base.map(([step, below]) => [step, below + (values.get(step) || 0)]);
    const layer = { name: s.name, points, base };
    base = points;
    return layer;
  });
}

function column(name) {
  const steps = data.metrics.step || [];
  return (data.metrics[name] || []).map((v, i) => [steps[i], v]).filter((p) => p[1] !== null && p[1] !== undefined);
}

function share(part, whole) {
  const wholes = new Map(column(whole));
  return column(part).filter(([step]) => wholes.get(step)).map(([step, v]) => [step, v / wholes.get(step)]);
}

function curves() {
  const evals = (name) => data.evals.filter((r) => r[name] !== null && r[name] !== undefined).map((r) => [r.step, r[name]]);
  // pass@k grows with k, so values of different k belong on no common line.
  const sameK = new Set(data.evals.map((r) => r.k)).size === 1;
  const withInterval = data.evals.filter((r) => Array.isArray(r.ci95));
  const phases = Object.keys(data.metrics).filter((n) => n.startsWith("time/") && n !== "time/step_s");
  const order = ["generate", "teacher", "score", "loss", "optimizer", "sync"];
  const rank = (n) => (order.indexOf(n) + 1 || order.length + 1);
  const names = phases.map((n) => n.slice(5).replace(/_s$/, "")).sort((a, b) => rank(a) - rank(b));
  const kAt = new Map(data.evals.map((r) => [r.step, `\u00b7 k ${r.k}`]));
  const one = (title, name, options) => chart({ title, series: [{ name, points: column(name) }], smooth: true, ...options });
  const charts = [
    chart({ title: "Held-out evaluation", format: percent, dots: true, note: (step) => kAt.get(step) || "", series: [
      { name: "avg@k", points: evals("avg_at_k"), low: withInterval.map((r) => [r.step, r.ci95[0]]), high: withInterval.map((r) => [r.step, r.ci95[1]]) },
      { name: "greedy", points: evals("greedy") }, { name: "pass@k", points: sameK ? evals("pass_at_k") : [] }] }),
    one("Rollout accuracy", "rollout/accuracy", { format: percent }),
    one("Agreement with teacher", "score/mean", {}),
    one("Loss", "optim/loss", {}),
    one("Gradient norm", "optim/grad_norm", {}),
    one("Token entropy, nats", "rollout/entropy_mean", {}),
    one("Rollout length, tokens", "rollout/length_mean", {}),
    chart({ title: "Teacher text missing", series: [{ name: "missing", points: share("teacher/missing", "teacher/continuations") }], format: percent, zero: true, smooth: true }),
    chart({ title: "Seconds a step", format: seconds, stacked: true, series: names.map((n) => ({ name: n, points: column(`time/${n}_s`) })) }),
  ].filter(Boolean);
  if (!charts.length) return section("Curves", "No step has been recorded yet.");
  const hints = [(data.metrics.step || []).length >= SMOOTH_FROM && "Thin: each step; bold: a moving average.",
    "Point at a chart to read all of them at that step.", data.every > 1 && `One step in ${data.every} is drawn.`];
  return section("Curves", hints.filter(Boolean).join(" "),
    el("div", { class: "charts" }, charts));
}

// ---- samples ----

const LOW = [208, 96, 28], MIDDLE = [150, 142, 122], HIGH = [10, 128, 124];
const blend = (a, b, t) => `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * t)).join(",")})`;
const tone = (score) => (score === null ? "var(--faint)" : score < 0.5 ? blend(LOW, MIDDLE, 2 * score) : blend(MIDDLE, HIGH, 2 * score - 1));
const view = { filter: "all", at: 0, shade: "entropy", chunk: null };
const FILTERS = {
  all: ["All", () => true],
  correct: ["Correct", (s) => s.correct === true],
  wrong: ["Wrong", (s) => s.correct === false],
  missing: ["Missing evidence", (s) => s.chunks.some((c) => c.score === null || c.continuations.some((k) => k.text === null))],
};

function quantile(values, q) {
  const sorted = values.filter((v) => v !== null).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : 0;
}
const entropyTop = Math.max(0.1, quantile(data.samples.flatMap((s) => s.entropies || []), 0.995));
const advantageTop = Math.max(1e-6, quantile(data.samples.flatMap((s) => (s.advantages || []).map(Math.abs)), 0.995));

function tint(sample, i) {
  if (view.shade === "advantage" && sample.advantages) {
    const value = sample.advantages[i] / advantageTop;
    const owner = value >= 0 ? "--positive" : "--negative";
    return `rgba(var(${owner}), ${(0.62 * Math.min(1, Math.abs(value))).toFixed(3)})`;
  }
  if (!sample.entropies) return "transparent";
  return `rgba(var(--heat), ${(0.72 * Math.min(1, sample.entropies[i] / entropyTop)).toFixed(3)})`;
}

function tokenNode(sample, i) {
  const facts = [`token ${i}: ${JSON.stringify(sample.tokens[i])}`];
  if (sample.entropies) facts.push(`entropy ${sample.entropies[i]} nats`);
  if (sample.advantages) facts.push(`advantage ${sample.advantages[i]}`);
  if (sample.tokens[i] === "") {
    const isEnd = i === sample.tokens.length - 1 && sample.finish === "stop";
    return isEnd ? el("span", { class: "end", title: facts.join("\n") }, "end") : null;
  }
  return el("span", { class: "token", title: facts.join("\n"), style: { background: tint(sample, i) } }, sample.tokens[i]);
}

function rolloutNode(sample) {
  const box = el("div", { class: "rollout" });
  let i = 0;
  sample.chunks.forEach((chunk, number) => {
    if (chunk.start < i) return;
    for (; i < chunk.start; i++) box.append(...[tokenNode(sample, i)].filter(Boolean));
    const choose = () => { view.chunk = number; markChunk(true); };
    const node = el("span", { class: `chunk${chunk.score === null ? " missing" : ""}`, "data-chunk": number, tabindex: 0, role: "button",
      "aria-label": `chunk ${number + 1}`, style: { "--tone": tone(chunk.score) }, onclick: choose,
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); } } },
      el("span", { class: "tag" }, chunk.score === null ? `${number + 1}: none` : `${number + 1}: ${chunk.score.toFixed(2)}`));
    for (; i < Math.min(chunk.end, sample.tokens.length); i++) node.append(...[tokenNode(sample, i)].filter(Boolean));
    box.append(node);
  });
  for (; i < sample.tokens.length; i++) box.append(...[tokenNode(sample, i)].filter(Boolean));
  return box;
}

function continuationNode(chunk, answer) {
  if (answer.text === null) {
    return el("div", { class: "continuation absent" }, el("span", {}, "no text"), el("span", {}, answer.detail ? `${answer.missing}: ${answer.detail}` : answer.missing));
  }
  let same = 0;
  while (same < answer.text.length && answer.text[same] === chunk.text[same]) same++;
  const known = answer.similarity !== null;
  return el("div", { class: "continuation" },
    el("span", { class: "meter", style: { "--tone": tone(answer.similarity), "--share": known ? percent(answer.similarity) : "0" } },
      known ? answer.similarity.toFixed(2) : "\u2013", el("i", {})),
    el("span", { class: "words" }, el("span", { class: "same" }, answer.text.slice(0, same)), answer.text.slice(same)));
}

function auditNode(chunk, number) {
  const unscored = chunk.detail ? `no score (${chunk.missing}): ${chunk.detail}` : `no score: ${chunk.missing}`;
  return el("article", { class: chunk.score === null ? "audit missing" : "audit", "data-chunk": number, style: { "--tone": tone(chunk.score) } },
    el("div", { class: "audit-head" }, el("strong", {}, `Chunk ${number + 1}`), el("span", {}, `tokens ${chunk.start}\u2013${chunk.end - 1}`),
      el("span", {}, chunk.score === null ? unscored : `agreement ${chunk.score.toFixed(3)} (${chunk.scorer})`),
      chunk.weight !== null && el("span", {}, `weight ${chunk.weight.toFixed(3)}`)),
    el("div", { class: "audit-body" },
      el("div", {}, el("span", { class: "label" }, "The student wrote"), el("div", { class: "words" }, chunk.text)),
      el("div", {}, el("span", { class: "label" }, `The teacher (${chunk.teacher}) wrote`), chunk.continuations.map((c) => continuationNode(chunk, c)))));
}

function legend(sample) {
  const ramp = (background) => el("i", { class: "ramp", style: { background } });
  const shade = view.shade === "advantage" && sample.advantages
    ? el("span", {}, `advantage \u2212${plain(advantageTop)}`, ramp("linear-gradient(90deg, rgba(var(--negative), .62), transparent, rgba(var(--positive), .62))"), `+${plain(advantageTop)}`)
    : sample.entropies && el("span", {}, "entropy 0", ramp("linear-gradient(90deg, transparent, rgba(var(--heat), .72))"), `${plain(entropyTop)} nats`);
  return el("div", { class: "legend" }, shade,
    sample.chunks.length > 0 && el("span", {}, "agreement 0", ramp(`linear-gradient(90deg, ${tone(0)}, ${tone(0.5)}, ${tone(1)})`), "1"),
    sample.chunks.length > 0 && el("span", {}, el("i", { class: "dashed" }), "too little evidence"));
}

const promptText = (sample) => sample.prompt.map((m) => (sample.prompt.length > 1 ? `${m.role}: ${m.content}` : m.content)).join("\n\n");
const judged = (sample) => (sample.correct === true ? ["good", "correct"] : sample.correct === false ? ["bad", "wrong"] : ["", "not verified"]);

function sampleNode(sample) {
  const [mood, word] = judged(sample);
  const facts = [`step ${sample.step}`, sample.id, `${sample.tokens.length} tokens`];
  if (sample.answer !== null) facts.push(`expected ${sample.answer}`);
  if (sample.finish !== "stop") facts.push(sample.finish === "length" ? "cut at the length limit" : sample.finish);
  if (sample.author !== "student") facts.push(`written by the ${sample.author}`);
  return [
    el("div", { class: "sample-head" }, el("span", { class: `chip ${mood}` }, word), facts.map((fact) => el("span", {}, fact))),
    el("span", { class: "label" }, "Prompt"), el("div", { class: "prompt" }, promptText(sample)),
    el("span", { class: "label" }, "Rollout"), rolloutNode(sample), legend(sample),
    sample.notes.length > 0 && el("p", { class: "hint" }, sample.notes.join("; ")),
    sample.chunks.map(auditNode),
  ].flat().filter(Boolean);
}

const parts = {};
const shown = () => data.samples.filter(FILTERS[view.filter][1]);

function markChunk(scroll) {
  for (const node of parts.sample.querySelectorAll("[data-chunk]")) {
    node.classList.toggle("active", Number(node.dataset.chunk) === view.chunk);
  }
  const panel = scroll && parts.sample.querySelector(`article[data-chunk="${view.chunk}"]`);
  if (panel) panel.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

function listButton(sample, i) {
  const [mood, word] = judged(sample);
  return el("button", { "aria-current": i === view.at ? "true" : "false", onclick: () => move(i) },
    el("span", { class: `dot ${mood}`, title: word }), el("div", {}, `step ${sample.step}`, el("small", {}, promptText(sample))));
}

function draw() {
  const samples = shown();
  view.at = Math.max(0, Math.min(view.at, samples.length - 1));
  const sample = samples[view.at];
  for (const [name, button] of Object.entries(parts.filters)) button.setAttribute("aria-pressed", String(name === view.filter));
  parts.list.replaceChildren(...samples.map(listButton));
  parts.count.textContent = samples.length ? `${view.at + 1} of ${samples.length}` : "none";
  parts.previous.disabled = view.at === 0;
  parts.next.disabled = view.at >= samples.length - 1;
  parts.sample.replaceChildren(...(sample ? sampleNode(sample) : [el("p", { class: "empty" }, "No recorded sample is of this kind.")]));
  if (sample) {
    parts.slider.value = String(parts.steps.indexOf(sample.step));
    parts.stepName.textContent = String(sample.step);
  }
}

function move(to) {
  view.at = to;
  view.chunk = null;
  draw();
  const current = parts.list.querySelector('[aria-current="true"]');
  if (!current) return;
  // Scrolls the list alone; scrollIntoView would move the page under the reader.
  parts.list.scrollTop = current.offsetTop - parts.list.offsetTop - parts.list.clientHeight / 2;
  parts.list.scrollLeft = current.offsetLeft - parts.list.offsetLeft - parts.list.clientWidth / 2;
}

function toStep(index) {
  const wanted = parts.steps[index];
  const samples = shown();
  const found = samples.findIndex((s) => s.step >= wanted);
  if (samples.length) move(found < 0 ? samples.length - 1 : found);
}

function browser() {
  if (!data.samples.length) return section("Samples", "This run has recorded no rollouts.");
  parts.steps = [...new Set(data.samples.map((s) => s.step))].sort((a, b) => a - b);
  parts.filters = {};
  const segments = el("div", { class: "segments", role: "group", "aria-label": "which samples" });
  for (const [name, [label, test]] of Object.entries(FILTERS)) {
    const count = data.samples.filter(test).length;
    parts.filters[name] = el("button", { disabled: count === 0, onclick: () => { view.filter = name; move(0); } }, `${label} ${count}`);
    segments.append(parts.filters[name]);
  }
  parts.slider = el("input", { type: "range", min: 0, max: parts.steps.length - 1, step: 1, "aria-label": "step", oninput: (event) => toStep(Number(event.target.value)) });
  parts.stepName = el("span", { class: "num" });
  parts.previous = el("button", { "aria-label": "previous sample", onclick: () => move(view.at - 1) }, "\u2190");
  parts.next = el("button", { "aria-label": "next sample", onclick: () => move(view.at + 1) }, "\u2192");
  parts.count = el("span", {});
  parts.list = el("nav", { class: "list", "aria-label": "samples" });
  parts.sample = el("div", { class: "sample", "aria-live": "polite" });
  const shade = data.samples.some((s) => s.advantages) && el("label", {}, "Shade",
    el("select", { onchange: (event) => { view.shade = event.target.value; draw(); } },
      el("option", { value: "entropy" }, "entropy"), el("option", { value: "advantage" }, "advantage")));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "ArrowRight" && !parts.next.disabled) move(view.at + 1);
    if (event.key === "ArrowLeft" && !parts.previous.disabled) move(view.at - 1);
  });
  const node = section("Samples", `${data.samples.length.toLocaleString("en")} of ${data.recorded.toLocaleString("en")} recorded rollouts, spread over the steps. Arrow keys move.`,
    el("div", { class: "card" },
      el("div", { class: "controls" }, segments, el("label", {}, "Step", parts.slider, parts.stepName), shade,
        el("span", { class: "pager" }, parts.previous, parts.count, parts.next)),
      el("div", { class: "browser" }, parts.list, parts.sample)));
  draw();
  return node;
}

// ---- facts ----

function environmentRows() {
  const e = data.environment;
  if (!e) return [];
  const git = (state) => (state ? `${state.revision.slice(0, 12)}${state.dirty ? ", with uncommitted changes" : ""}` : "none");
  const packages = Object.entries(e.packages).filter(([, version]) => version).map(([name, version]) => `${name} ${version}`);
  return [["Command", e.argv.join(" ")], ["omniopd", e.omniopd || "not installed, run from source"], ["Python", e.python],
    ["Platform", e.platform], ["CPU cores", String(e.cpu_count)], ["Source revision", git(e.git.source)],
    ["Folder revision", git(e.git.current_directory)], ["Packages", packages.join(", ")],
    e.earlier.length > 0 && ["Resumed", `${e.earlier.length} time${e.earlier.length > 1 ? "s" : ""}`]].filter(Boolean);
}

function metricsTable() {
  const rows = Object.keys(data.metrics).filter((name) => name !== "step").map((name) => [name, column(name).map((p) => p[1])]).filter(([, v]) => v.length);
  const cells = (v) => [v[0], v[v.length - 1], Math.min(...v), Math.max(...v), v.reduce((a, b) => a + b, 0) / v.length];
  return el("table", { class: "right" }, el("tr", {}, ["Metric", "first", "last", "least", "most", "mean"].map((name) => el("th", {}, name))),
    rows.map(([name, v]) => el("tr", {}, el("td", { class: "mono" }, name), cells(v).map((value) => el("td", {}, plain(value))))));
}

const table = (rows, kind) => el("table", { class: kind }, rows.map(([name, value]) =>
  el("tr", {}, el("td", { class: /^[a-z]/.test(name) ? "sub" : null }, name), el("td", {}, value))));
const folded = (title, ...children) => el("details", { class: "card" }, el("summary", {}, title), el("div", { class: "scroll" }, ...children));

function facts() {
  const parameters = el("table", { class: "named" }, data.objective.parts.map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", { class: "mono" }, value))));
  return section("How it was made", null,
    el("div", { class: "facts" },
      el("div", { class: "card" }, el("h3", {}, "Objective"), data.objective.text.map((line) => el("p", {}, line)), parameters),
      el("div", { class: "card" }, el("h3", {}, "Cost"), table(data.costs, "right"))),
    folded("Configuration (resolved)", el("pre", {}, data.config)),
    data.environment && folded("Environment", table(environmentRows(), "named")),
    folded("All metrics", metricsTable()));
}

document.getElementById("page").append(...[hero(), curves(), diagnostics(), browser(), facts()].filter(Boolean),
  el("footer", {}, "Every number on this page is read from the records in the run folder."));
document.documentElement.dataset.ready = "true";
