"""The style sheet of a parity report: one column of text, light or dark as the reader's system is."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfbf9; --card: #ffffff; --ink: #1c1d21; --muted: #62656e; --line: #e3e1dc;
  --pass: #1a7f4b; --pass-card: #e8f5ee; --fail: #b3261e; --fail-card: #fdecea;
  --mark: #fde4b0; --series-1: #2f5fb3; --series-2: #c2571a; --series-3: #2c8a74;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141518; --card: #1c1e22; --ink: #e9e9ec; --muted: #9da1ab; --line: #33363d;
    --pass: #63cf97; --pass-card: #15291f; --fail: #ff8a80; --fail-card: #361a18;
    --mark: #5c4715; --series-1: #86aef2; --series-2: #f0a069; --series-3: #6fd0b8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0; color: var(--muted); }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 3rem 0 .6rem; }
h3 { font-size: 1rem; line-height: 1.3; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0 .9rem; max-width: 46rem; }
.subject { font-size: 1.9rem; line-height: 1.25; font-weight: 650; margin: .2rem 0 1.4rem;
  letter-spacing: -.012em; overflow-wrap: anywhere; }
.note { color: var(--muted); font-size: .92rem; }
.verdict { border-left: 5px solid; border-radius: 4px; padding: 1rem 1.3rem; margin: 0 0 1.4rem; }
.verdict.pass { background: var(--pass-card); border-color: var(--pass); }
.verdict.fail { background: var(--fail-card); border-color: var(--fail); }
.verdict strong { font-size: 1.15rem; }
.verdict.pass strong, .ok { color: var(--pass); }
.verdict.fail strong, .bad { color: var(--fail); }
.verdict p { margin: .15rem 0 0; }
.verdict ul { margin: .5rem 0 0; padding-left: 1.2rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem 2rem;
  margin: 0; }
.facts dt { color: var(--muted); font-size: .85rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { text-align: left; padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--muted); font-size: .85rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem; }
figure:first-child { grid-column: 1 / -1; }
figure { margin: 0; padding: .9rem 1rem .5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
figcaption { font-size: .92rem; font-weight: 600; margin-bottom: .4rem; }
svg { width: 100%; height: auto; display: block; }
figure + figure svg { max-width: 30rem; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1.1rem;
  margin: 0 0 .9rem; }
.sample header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .2rem 1rem;
  font-size: .92rem; margin-bottom: .5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 0; font-size: .95rem;
  line-height: 1.5; max-width: none; }
.prompt, .rest { color: var(--muted); }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: .05em .2em; }
details { border-bottom: 1px solid var(--line); padding: .45rem 0; }
summary { cursor: pointer; display: flex; gap: 1rem; justify-content: space-between; }
summary::before { content: "+"; color: var(--muted); margin-right: -.4rem; }
details[open] summary::before { content: "\\2212"; }
summary span:first-of-type { flex: 1; }
details .text { padding: .6rem 0 .6rem 1rem; }
@media print { details .text { display: block; } figure, .sample { break-inside: avoid; } }
"""
