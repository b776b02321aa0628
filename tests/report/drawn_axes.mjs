// Draw a histogram of positive margins with report.js, without a browser, and count what lies outside its axes.
import fs from "fs";
const code = fs.readFileSync(process.argv[2], "utf8").replace(/\nmain\(\);\s*$/, "\n");
const made = [];
function element(tag) { const e = { tag, attrs: {}, children: [], append(...c) { e.children.push(...c); }, setAttribute(k, v) { e.attrs[k] = v; }, addEventListener() {}, set textContent(t) { e.text = t; } }; made.push(e); return e; }
globalThis.document = { createElementNS: (_, t) => element(t), createElement: element, getElementById: () => element("x"), querySelector: () => element("x"), querySelectorAll: () => [], documentElement: { dataset: {} } };
globalThis.matchMedia = () => ({ matches: false, addEventListener() {} });
const run = new Function("made", code + `
 const spec = { title: "m", xLabel: "x", yLabel: "y", x: { format: short }, y: { low: 0, format: short }, guides: [{ x: 0 }],
   series: [{ name: "pairs", colour: "accent", edges: [5, 6, 7, 8], x: [5.5, 6.5, 7.5], y: [0.2, 0.5, 0.3], low: undefined }] };
 const colour = { muted: "m", rule: "r", ink: "i", accent: "a" };
 const { box, px } = drawChart(spec, 520, colour);
 return { box, xs: [px(5), px(8)], made };`);
const { box, xs } = run(made);
let bad = 0;
for (const e of made) {
  for (const k of ["x1", "x2"]) if (k in e.attrs && (e.attrs[k] < box.left - 0.5 || e.attrs[k] > box.right + 0.5)) { bad++; }
  for (const m of (e.attrs.d ?? "").matchAll(/[ML]([-\d.]+) /g)) if (+m[1] < box.left - 0.5 || +m[1] > box.right + 0.5) bad++;
}
console.log(bad, made.length);
