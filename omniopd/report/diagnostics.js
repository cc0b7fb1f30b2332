"use strict";
// The diagnostics of a run as pictures. Functions only: what they use is defined in template.js, which follows.

function diagnostics() {
  const found = data.diagnostics;
  const parts = [...found.teachers.map((t) => matchPictures(t, found.teachers.length > 1)), alarmPictures(found.alarms), probePictures(found.probes)];
  const shown = parts.filter(Boolean);
  if (!shown.length) return null;
  const hint = found.teachers.length ? "Student and teacher token by token, on the student's own text. Nothing here is trained on." : "Nothing here is trained on.";
  return section("Diagnostics", hint, shown);
}

function matchPictures(teacher, named) {
  const { means } = teacher;
  const curve = (name, of) => ({ name, points: means[of] || [] });
  const over = (title, series, options) => chart({ title, series, dots: true, ...options });
  const sides = (of) => ["correct", "wrong"].map((verdict) => ({
    name: `${verdict} rollouts`, points: (teacher.by_correctness[of] || {})[verdict] || [], color: verdict === "correct" ? "var(--good)" : "var(--bad)" }));
  const k = teacher.top_k;
  const charts = [
    over(`Shared among the ${k} likeliest tokens`, [curve("overlap", "overlap_ratio")], { format: percent }),
    over("Teacher minus student, nats a token", [curve("log-ratio", "log_ratio")]),
    over("Entropy gap, nats", [curve("size", "entropy_gap"), curve("teacher minus student", "entropy_gap_signed")]),
    over("Teacher minus student, by verdict", sides("log_ratio")),
    over(`Probability on the ${k} likeliest tokens`, [curve("student on its own", "student_mass_on_student_top_k"),
      curve("teacher on the student's", "teacher_mass_on_student_top_k"), curve("student on the teacher's", "student_mass_on_teacher_top_k")], { format: percent }),
    over("Student's choices outside the teacher's likeliest", [curve("outside", "sampled_outside_top_k")], { format: percent, zero: true }),
    profile("Teacher minus student along the rollout", teacher.profiles.log_ratio, plain),
    profile("Shared likeliest tokens along the rollout", teacher.profiles.overlap_ratio, percent),
    profile("Entropy gap along the rollout, nats", teacher.profiles.entropy_gap, plain),
  ].filter(Boolean);
  return charts.length ? [named && el("h3", { class: "group" }, teacher.name), el("div", { class: "charts" }, charts)] : null;
}

// Ten bars from the rollout's begin to its end: the first comparison pale, the last one strong.
function profile(title, ends, format) {
  const values = (ends || []).flatMap((end) => end.values).filter((v) => v !== null);
  if (!values.length) return null;
  const bins = ends[0].values.length;
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const room = high - low || 1;
  const width = (WIDTH - LEFT - RIGHT) / bins;
  const y = (v) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * (v - low)) / room;
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  for (const tick of niceTicks(low, high, 4)) {
    picture.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick), class: "grid" }),
      svg("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
  const tones = ends.length > 1 ? ["var(--faint)", "var(--accent)"] : ["var(--accent)"];
  const thick = (0.8 * width) / ends.length;
  ends.forEach((end, i) => end.values.forEach((v, bin) => {
    if (v === null) return;
    const name = `${title}: step ${end.step}, part ${bin + 1} of ${bins}: ${format(v)}`;
    picture.append(svg("rect", { x: LEFT + bin * width + 0.1 * width + i * thick, y: Math.min(y(v), y(0)), width: thick,
      height: Math.max(0.8, Math.abs(y(v) - y(0))), fill: tones[i], opacity: i < ends.length - 1 ? 0.5 : 1 }, svg("title", {}, name)));
  }));
  picture.append(svg("text", { x: LEFT, y: HEIGHT - 6 }, "begin"), svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, "end of the rollout"));
  const keys = ends.map((end, i) => el("span", {}, el("i", { style: { background: tones[i] } }), `step ${end.step}`));
  return el("div", { class: "chart card" }, el("div", { class: "chart-head" }, el("h3", {}, title)), picture, el("div", { class: "keys" }, keys));
}

// One row for each alarm, a mark at each step where it stood.
function alarmPictures(alarms) {
  const names = Object.keys(alarms.steps);
  const steps = data.metrics.step || [];
  if (!names.length || !steps.length) return null;
  const [first, last] = [steps[0], steps[steps.length - 1]];
  const [wide, row, left] = [960, 26, 92];
  const cell = Math.max(2, (wide - left) / (last - first + 1));
  const x = (step) => left + ((wide - left - cell) * (step - first)) / (last - first || 1);
  const picture = svg("svg", { viewBox: `0 0 ${wide} ${row * names.length + 18}`, role: "img", "aria-label": "alarms over the steps" });
  names.forEach((name, i) => {
    picture.append(svg("text", { x: 0, y: row * i + 17 }, name),
      svg("rect", { x: left, y: row * i + 6, width: wide - left, height: 14, rx: 3, fill: "var(--sunken)" }));
    for (const step of alarms.steps[name]) {
      picture.append(svg("rect", { x: x(step), y: row * i + 6, width: cell, height: 14, fill: "var(--bad)" }, svg("title", {}, `${name}: step ${step}`)));
    }
  });
  picture.append(svg("text", { x: left, y: row * names.length + 14 }, `step ${first}`),
    svg("text", { x: wide, y: row * names.length + 14, "text-anchor": "end" }, `step ${last}`));
  const said = alarms.said.map((alarm) => el("p", {}, `Step ${alarm.step}: ${alarm.text}.`));
  return el("div", { class: "chart card alarms" }, el("div", { class: "chart-head" }, el("h3", {}, "Alarms"),
    el("output", {}, said.length ? `${said.length} began` : "none")), picture, said);
}

function probePictures(probes) {
  const found = Object.entries(probes);
  return found.length ? found.map(([name, probe]) => folded(`Prefix probe of ${name}, step ${probe.step}`, el("pre", {}, probe.lines.join("\n")))) : null;
}
