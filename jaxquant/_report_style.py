"""How the page of `jaxquant report` looks: light and dark, on phones and desktops."""

STYLE = """
:root {
  --paper: #fff; --card: #f6f7f9; --ink: #16191d; --soft: #545b66; --edge: #d5d9e0; --good: #0b6b3a;
  --s0: #0067b1; --s1: #b84a00; --s2: #00775a; --s3: #8a3f99; --s4: #6a6200; --s5: #4a4f57;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1c2026; --ink: #eceff3; --soft: #a4adba; --edge: #3a414b; --good: #63d297;
    --s0: #62b4ff; --s1: #ffa15c; --s2: #4cd3ac; --s3: #dd9bea; --s4: #d8cd55; --s5: #c3c9d2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 66rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.25rem 0 .5rem; font-size: 1.2rem; }
p { margin: .35rem 0; }
ul { margin: .5rem 0; padding-left: 1.25rem; }
header p { color: var(--soft); }
.over { font-size: .85rem; letter-spacing: .04em; }
section:first-child {
  margin-top: 1.25rem; padding: 1rem 1.25rem; background: var(--card); border: 1px solid var(--edge);
  border-left: 6px solid var(--good); border-radius: 6px;
}
section:first-child h2 { margin: 0; font-size: 1rem; color: var(--soft); }
.choice { font-size: 1.6rem; font-weight: 650; line-height: 1.25; }
.scroll { overflow-x: auto; border: 1px solid var(--edge); border-radius: 6px; }
.scroll:focus-visible { outline: 3px solid var(--s0); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr > :first-child, tr > :last-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; background: var(--card); }
tbody tr { border-top: 1px solid var(--edge); }
tbody th { font-weight: 600; }
figure { margin: .75rem 0; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 12px; stroke: var(--paper); stroke-width: 3px; paint-order: stroke; }
svg .name { font-weight: 700; }
.grid { stroke: var(--edge); }
.axis { stroke: var(--soft); }
.limit { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
.ring { fill: none; stroke: var(--ink); stroke-width: 2; }
.line { fill: none; stroke-width: 1.75; }
.mark { stroke: var(--paper); stroke-width: 1; }
.line.s0 { stroke: var(--s0); } .mark.s0, svg text.s0 { fill: var(--s0); }
.line.s1 { stroke: var(--s1); } .mark.s1, svg text.s1 { fill: var(--s1); }
.line.s2 { stroke: var(--s2); } .mark.s2, svg text.s2 { fill: var(--s2); }
.line.s3 { stroke: var(--s3); } .mark.s3, svg text.s3 { fill: var(--s3); }
.line.s4 { stroke: var(--s4); } .mark.s4, svg text.s4 { fill: var(--s4); }
.line.s5 { stroke: var(--s5); } .mark.s5, svg text.s5 { fill: var(--s5); }
.narrow { display: none; }
@media (max-width: 700px) { .wide { display: none; } .narrow { display: block; } }
summary { cursor: pointer; padding: .25rem 0; }
dl { display: grid; grid-template-columns: 9rem 1fr; gap: .35rem 1rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; }
@media (max-width: 560px) {
  th, td { padding: .35rem .5rem; }
  dl { grid-template-columns: 1fr; gap: .1rem; }
  dd { margin-bottom: .6rem; }
}
@media print { .scroll { overflow: visible; } }
"""
