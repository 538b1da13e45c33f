"""The report's style sheet: light, dark, and on paper."""

STYLE = """
:root{--ink:#1c2024;--soft:#5b6470;--paper:#fff;--card:#f6f7f9;--rule:#dfe3e8;
--c0:#1f6feb;--c1:#c2570c;--c2:#0f7b5f;--c3:#8b3fae;--c4:#b3261e;--c5:#6b6f00}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#9aa4b0;--paper:#14171b;
--card:#1d2127;--rule:#333a43;--c0:#6ea8ff;--c1:#f0944d;--c2:#4cc9a4;--c3:#cf94ea;--c4:#f28b82;
--c5:#c9cc5a}}
@media print{:root{--ink:#000;--soft:#444;--paper:#fff;--card:#fff;--rule:#ccc;--c0:#1f6feb;
--c1:#c2570c;--c2:#0f7b5f;--c3:#8b3fae;--c4:#b3261e;--c5:#6b6f00}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
main{max-width:960px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 6px}
h1 small{font-size:1rem;font-weight:400;color:var(--soft)}
h2{font-size:1.15rem;margin:44px 0 4px}
h3{font-size:.9rem;margin:18px 0 4px}
p{margin:4px 0 12px;color:var(--soft);max-width:74ch}
code{font-family:ui-monospace,Menlo,Consolas,"Liberation Mono",monospace;font-size:.9em;
color:var(--soft);font-weight:400}
svg{display:block;width:100%;height:auto;max-height:none}
svg text{fill:var(--soft);font-size:12px}
svg .title{fill:var(--ink)}
.rule{stroke:var(--rule);stroke-width:1}
.mark{stroke:var(--ink);stroke-width:1;stroke-dasharray:4 3}
.tick{stroke:var(--ink);stroke-width:1;opacity:.55}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.dashed{stroke-dasharray:5 4}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}
.c5{--c:var(--c5)}
.line{stroke:var(--c)}.fill{fill:var(--c)}.dot{fill:var(--c)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;color:var(--ink);font-size:.85rem;max-width:none}
.legend span{display:inline-flex;align-items:center;gap:7px}
.key{width:16px;border-top:4px solid var(--c);border-radius:1px}
.key.dashed{border-top-style:dotted}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;
margin-top:18px}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:8px;
padding:12px 14px}
.tiles b{display:block;font-size:.85rem;font-weight:600}
.tiles strong{display:block;font-size:1.7rem;line-height:1.25;font-weight:650}
.tiles small{font-size:.85rem;font-weight:400;color:var(--soft)}
.tiles span{font-size:.8rem;color:var(--soft)}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(270px,100%),1fr));
gap:8px 20px}
.row>div{min-width:0}
.row svg{max-width:430px}
.wide{overflow-x:auto}
.wide svg{min-width:640px}
table{border-collapse:collapse;width:100%;font-size:.82rem;font-variant-numeric:tabular-nums;
margin:8px 0}
th,td{text-align:right;padding:4px 8px;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:600;color:var(--soft);white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
.part td{font-weight:600;padding-top:14px}
.words td,.words th{text-align:left;white-space:normal;vertical-align:top}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:8px 0;font-size:.88rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:520px){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}}
@media print{main{max-width:none;padding:0}body{font-size:10.5pt}
h2{margin-top:22px;break-after:avoid}p,h3,dl{break-inside:avoid}p,h3{break-after:avoid}
.wide{overflow:visible;break-inside:avoid}.wide svg{min-width:0}
.row{grid-template-columns:repeat(3,1fr);gap:4px 10px}@page{margin:14mm}}
""".replace("\n", "")
