"""The report's style sheet: light and dark, screen and paper. Colours are told apart without hue."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f7f9fb; --ink: #1a2026; --muted: #5a6672; --rule: #dde3e8;
  --s0: #1f6fb8; --s1: #e08a3c; --s2: #14806a; --s3: #8e5bb0; --heat: #2576c8; --on: #ffffff;
  --over: #c8561b; --under: #2576c8; --good: #14806a;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #12161b; --card: #191f26; --ink: #e6ebf0; --muted: #9ba8b4; --rule: #2c353f;
  --s0: #5aa9ec; --s1: #f0a35e; --s2: #4cc2a5; --s3: #c39be0; --heat: #2a76c6; --on: #ffffff;
  --over: #f08a4b; --under: #4b9be8; --good: #4cc2a5;
  --picture: brightness(1.5) saturate(1.15);
} }
@media print { :root {
  --page: #fff; --card: #fff; --ink: #000; --muted: #444; --rule: #bbb;
  --s0: #1f6fb8; --s1: #e08a3c; --s2: #14806a; --s3: #8e5bb0; --heat: #2576c8; --on: #fff;
  --over: #c8561b; --under: #2576c8; --good: #14806a; --picture: none;
} }
* { box-sizing: border-box; }
html { background: var(--page); }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 73rem; color: var(--ink);
  background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .3rem; }
h2 {
  font-size: 1.55rem; letter-spacing: -.015em; margin: 3.2rem 0 .4rem; padding-top: 1.4rem;
  border-top: 2px solid var(--ink);
}
h3 { font-size: 1.12rem; margin: 2.4rem 0 .3rem; }
h4 { font-size: .92rem; margin: .9rem 0 .3rem; } figure h4 { margin: 0 0 .5rem; }
p { max-width: 46rem; margin: .3rem 0 .9rem; }
p.lead { font-size: 1.1rem; }
.muted, figcaption, caption { color: var(--muted); }
nav { margin: .8rem 0 0; }
nav a { margin-right: 1.2rem; }
a { color: var(--s0); }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.02em; }
.tile b.good { color: var(--good); }
.tile span { color: var(--muted); font-size: .85rem; line-height: 1.35; display: block; }
.row { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; align-items: stretch; }
figure {
  margin: .6rem 0; padding: .9rem 1rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; break-inside: avoid; max-width: 100%; overflow-x: auto;
}
figcaption { font-size: .85rem; margin-top: .5rem; max-width: 44rem; line-height: 1.4; }
.row > figure { flex: 0 1 auto; margin: .3rem 0; }
.row > figure figcaption { width: 0; min-width: 100%; }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--ink); font-family: inherit; }
svg .muted { fill: var(--muted); }
svg .strong { font-weight: 650; }
svg .cell { font-size: 12.5px; font-variant-numeric: tabular-nums; }
svg .cell.on { fill: var(--on); }
.s0 { fill: var(--s0); } .s1 { fill: var(--s1); } .s2 { fill: var(--s2); } .s3 { fill: var(--s3); }
.heat { fill: var(--heat); } .over { fill: var(--over); } .under { fill: var(--under); }
.grid { stroke: var(--rule); fill: none; }
svg image { filter: var(--picture, none); }
.frame { fill: none; stroke: var(--muted); }
.border { stroke: var(--ink); stroke-opacity: .55; fill: none; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.line.l0, .dot.l0 { stroke: var(--s0); } .line.l1, .dot.l1 { stroke: var(--s1); }
.line.l2, .dot.l2 { stroke: var(--s2); } .line.l3, .dot.l3 { stroke: var(--s3); }
.line.l1 { stroke-dasharray: 7 3; } .line.l2 { stroke-dasharray: 2 3; }
.line.l3 { stroke-dasharray: 10 3 2 3; }
.line.quiet { stroke: var(--muted); stroke-width: 1.2; stroke-dasharray: 1 3; }
.dot { fill: var(--card); stroke-width: 1.8; }
.dot.quiet { stroke: var(--muted); stroke-width: 1; }
svg .name { font-weight: 600; }
svg .name.l0 { fill: var(--s0); } svg .name.l1 { fill: var(--s1); }
svg .name.l2 { fill: var(--s2); } svg .name.l3 { fill: var(--s3); }
svg .name.quiet { fill: var(--muted); font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
caption { text-align: left; font-size: .85rem; padding-bottom: .3rem; }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; }
thead th { font-weight: 600; border-bottom: 1px solid var(--muted); vertical-align: bottom; }
tbody th { font-weight: 400; }
td.good { color: var(--good); font-weight: 600; }
td.bad { color: var(--over); font-weight: 600; }
.chips { list-style: none; padding: 0; margin: .4rem 0; display: flex; flex-wrap: wrap; gap: .4rem; }
.chips li {
  border: 1px solid var(--rule); background: var(--card); border-radius: 99px; font-size: .85rem;
  padding: .1rem .7rem; font-variant-numeric: tabular-nums;
}
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; max-width: 42rem; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@page { size: A4; margin: 12mm; }
@media print {
  body { zoom: .64; max-width: none; padding: 0; }
  .row { gap: .3rem .8rem; }
  section + section h2 { break-before: page; }
  h3, h4 { break-after: avoid; } .scroll, .row { break-inside: avoid; } nav { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
