"""How the page looks, light and dark, and the little that moves on it: reading values off a chart, and the switch."""

# Eight colours that stay apart for people who see red and green alike, in this order; a darker and a lighter set.
LIGHT = ("#2a78d6", "#eb6834", "#1baf7a", "#4a3aa7", "#eda100", "#e87ba4", "#008300", "#e34948")
DARK = ("#3987e5", "#d95926", "#199e70", "#9085e9", "#c98500", "#d55181", "#3fa34d", "#e66767")
DASHES = ("none", "7 4", "2 3", "9 3 2 3", "1 4", "12 4", "4 2 1 2", "6 6")

_LIGHT = """--page:#f9f9f7;--card:#fff;--ink:#0b0b0b;--soft:#52514e;--faint:#6f6d68;--line:#e1e0d9;--edge:#c3c2b7;
--good:#006300;--bad:#b3261e;--hatch:rgba(255,255,255,.62)"""
_DARK = """--page:#0d0d0d;--card:#1a1a19;--ink:#fff;--soft:#c3c2b7;--faint:#a19f98;--line:#2c2c2a;--edge:#4a4945;
--good:#0ca30c;--bad:#ff7b72;--hatch:rgba(0,0,0,.5)"""


def _colours(colours: tuple[str, ...]) -> str:
    """The colours as variables."""
    return ";".join(f"--c{number}:{colour}" for number, colour in enumerate(colours))


def _classes() -> str:
    """The classes of curves and of a bar's parts."""
    return "".join(
        f".s{number}{{--own:var(--c{number})}}.line.s{number}{{stroke-dasharray:{dash}}}.c{number}{{fill:var(--c{number})}}"
        for number, dash in enumerate(DASHES)
    )


CSS = (
    f"""
:root{{color-scheme:light;{_LIGHT};{_colours(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{_DARK};{_colours(DARK)}}}}}
:root[data-theme=dark]{{color-scheme:dark;{_DARK};{_colours(DARK)}}}
{_classes()}
"""
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
header{display:flex;gap:16px;align-items:flex-start;justify-content:space-between}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}h2{font-size:18px;margin:36px 0 10px}h3{font-size:14px;margin:0 0 6px}
p{margin:6px 0}a{color:inherit}.soft,.none{color:var(--soft)}.card .soft{font-size:13px}.none{font-style:italic}
button{font:inherit;font-size:13px;color:var(--soft);background:var(--card);border:1px solid var(--edge);
border-radius:6px;padding:4px 10px;cursor:pointer;white-space:nowrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(146px,1fr));gap:10px;margin:18px 0}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.tile .label{color:var(--soft);font-size:12.5px}.tile .value{font-size:22px;font-weight:600;line-height:1.25;
white-space:nowrap}.value small{font-size:13px;
font-weight:400;color:var(--soft)}
.tile .more{color:var(--faint);font-size:12px}
.tile svg{display:block;margin-top:6px}
.grid2{display:grid;align-items:start;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:12px}
.card>p:last-child{margin-bottom:0}main>.card+.card,.grid2+.card{margin-top:12px}
table{border-collapse:collapse;width:100%;font-size:13.5px}
.scroll{overflow-x:auto}
th,td{text-align:left;padding:5px 10px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:12.5px}tr:last-child td{border-bottom:0}
td{overflow-wrap:anywhere}td:first-child{overflow-wrap:normal}td.n,th.n{text-align:right;white-space:nowrap;overflow-wrap:normal;font-variant-numeric:tabular-nums}
code,td.code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
details{margin-top:8px}summary{cursor:pointer;color:var(--soft);font-size:13.5px}
pre{overflow-x:auto;font:12px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:8px 0}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
svg.chart:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
svg text{font-family:inherit;font-size:11px;fill:var(--soft)}
svg text.name{fill:var(--faint)}svg text.curve{font-weight:600;fill:var(--ink)}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--edge);stroke-width:1}
.line{fill:none;stroke:var(--own);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dot{fill:var(--card);stroke:var(--own);stroke-width:2}
.band{fill:var(--own);opacity:.16}
.mark line{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}.mark text{font-size:11px;font-weight:600}
.mark.fault line{stroke:var(--bad);stroke-dasharray:none;stroke-width:1.5}
.mark.fault text{fill:var(--bad)}
svg.bar{display:block;width:100%;height:34px}.patterns{position:absolute}
.patterns path{stroke:var(--hatch);fill:none;stroke-width:1.3}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:10px 0 0;padding:0;font-size:13.5px}
.legend svg{width:14px;height:14px;vertical-align:-2px;margin-right:6px}.legend span{color:var(--soft)}
.spark{width:100%;height:28px}.spark polyline{fill:none;stroke:var(--c0);stroke-width:1.5}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(96px,1fr));gap:10px}
figure{margin:0;font-size:12px;line-height:1.35}
figure img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:var(--line);border-radius:6px;
image-rendering:auto}
figcaption{margin-top:4px;overflow-wrap:anywhere}figcaption .wrong{color:var(--bad);font-weight:600}
figcaption .right{color:var(--good);font-weight:600}
.meter{display:inline-block;width:90px;height:8px;border:1px solid var(--edge);border-radius:4px;vertical-align:1px}
.meter i{display:block;height:100%;background:var(--c0);border-radius:3px 0 0 3px}
#tip{position:fixed;pointer-events:none;background:var(--card);color:var(--ink);border:1px solid var(--edge);
border-radius:6px;padding:5px 9px;font-size:12.5px;box-shadow:0 2px 8px rgba(0,0,0,.18);display:none;z-index:9}
#tip b{font-variant-numeric:tabular-nums}
.hair{stroke:var(--faint);stroke-width:1}
footer{margin-top:44px;color:var(--faint);font-size:12.5px}
@media print{button,#tip{display:none!important}.card,.tile{break-inside:avoid}}
"""
)

# Of a chart in a file of its own.
ALONE = (
    f":root{{{_LIGHT};{_colours(LIGHT)};font-family:system-ui,sans-serif}}{_classes()}"
    + CSS[CSS.index("svg text{") : CSS.index("svg.bar{")]
)

# The nearest recorded point of every curve under the pointer, or by the arrow keys where a chart has the focus.
SCRIPT = """
'use strict';
const root=document.documentElement,tip=document.getElementById('tip');
const dark=()=>root.dataset.theme?root.dataset.theme==='dark':matchMedia('(prefers-color-scheme:dark)').matches;
document.getElementById('theme').onclick=()=>{root.dataset.theme=dark()?'light':'dark'};
const show=(v,p)=>p?(v*100).toPrecision(4)*1+'%':Math.abs(v)>=1e-4&&Math.abs(v)<1e7||!v?String(+v.toPrecision(5)):
v.toExponential(3);
for(const svg of document.querySelectorAll('svg[data-chart]')){
const d=JSON.parse(svg.dataset.chart),[lo,hi,x0,x1]=d.x,xs=[...new Set(d.curves.flatMap(c=>c[1].map(p=>p[0])))]
.sort((a,b)=>a-b);
const hair=document.createElementNS('http://www.w3.org/2000/svg','line');hair.setAttribute('class','hair');
hair.setAttribute('y1',d.y[3]-8);hair.setAttribute('y2',d.y[2]);
let at=-1;
const place=v=>x0+(v-lo)/((hi-lo)||1)*(x1-x0);
const put=(i,left,top)=>{at=i;const x=xs[i],px=place(x);hair.setAttribute('x1',px);hair.setAttribute('x2',px);
svg.append(hair);
tip.replaceChildren(d.labels[0]+' '+show(x));
for(const [name,pts] of d.curves){let best=pts[0];for(const p of pts)if(Math.abs(p[0]-x)<Math.abs(best[0]-x))best=p;
const row=document.createElement('div'),b=document.createElement('b');b.textContent=show(best[1],d.percent);
row.append((name||d.labels[1])+' ',b);tip.append(row)}
tip.style.display='block';const w=tip.offsetWidth;
tip.style.left=Math.min(innerWidth-w-8,left+14)+'px';tip.style.top=Math.max(8,top-tip.offsetHeight-10)+'px'};
const hide=()=>{hair.remove();tip.style.display='none'};
svg.addEventListener('pointermove',e=>{const r=svg.getBoundingClientRect(),
v=lo+((e.clientX-r.left)/r.width*svg.viewBox.baseVal.width-x0)/(x1-x0)*(hi-lo);
let best=0;xs.forEach((x,i)=>{if(Math.abs(x-v)<Math.abs(xs[best]-v))best=i});put(best,e.clientX,e.clientY)});
svg.addEventListener('pointerleave',hide);svg.addEventListener('blur',hide);
svg.addEventListener('keydown',e=>{const by={ArrowLeft:-1,ArrowRight:1}[e.key];if(!by)return;e.preventDefault();
const r=svg.getBoundingClientRect(),i=Math.max(0,Math.min(xs.length-1,at<0?0:at+by));
put(i,r.left+place(xs[i])/svg.viewBox.baseVal.width*r.width,r.top+30)});
}
"""
