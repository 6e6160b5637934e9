"""The style sheet of the page: for phones and desktops, bright and dark."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #5b6169; --rule: #e0e3e7; --card: #f6f7f9;
  --one: #0072b2; --two: #d55e00; --three: #009e73; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8eaed; --soft: #a5acb5; --rule: #343941;
  --card: #1f2329; --one: #56b4e9; --two: #f0a050; --three: #4cc9a0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--rule); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; font-weight: 600; }
p, li, dt, figcaption { color: var(--soft); }
b, dd { color: var(--ink); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(45%, 16rem), 1fr)); gap: .5rem; margin: 1rem 0; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.tiles dt { font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
.chart { width: 100%; height: auto; display: block; }
.chart text { font-size: 13px; fill: var(--soft); }
.rule { stroke: var(--rule); fill: none; }
.line { fill: none; stroke: var(--one); stroke-width: 2; stroke-linejoin: round; }
.line.second { stroke: var(--two); }
.line.third { stroke: var(--three); }
.line.faint { stroke: var(--soft); stroke-width: 1.25; }
.dot { fill: var(--one); }
.dot.second { fill: var(--two); }
.dot.third { fill: var(--three); }
.dot.faint { fill: var(--soft); }
.level { stroke: var(--ink); stroke-dasharray: 5 4; fill: none; }
.keys { list-style: none; margin: .25rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.samples img { width: 100%; height: auto; border-radius: .25rem; display: block; }
.samples img.small { image-rendering: pixelated; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td { border-top: 1px solid var(--rule); padding: .25rem .5rem .25rem 0; vertical-align: top; }
td:first-child { color: var(--soft); width: 14rem; max-width: 40vw; }
pre { background: var(--card); border-radius: .5rem; padding: .75rem; overflow-x: auto; font-size: .85rem; white-space: pre;
  overflow-wrap: normal; }
.ranks { max-height: 30rem; overflow-y: auto; font-size: .8rem; }
.ranks div { display: grid; grid-template-columns: minmax(0, 26rem) minmax(4rem, 1fr) 2.5rem; gap: .5rem; align-items: center; }
.ranks i { display: block; height: .6rem; background: var(--one); border-radius: 2px; }
.ranks b { text-align: right; }
.note { background: var(--card); border-left: 4px solid var(--two); padding: .5rem .75rem; }
summary { cursor: pointer; }
"""
