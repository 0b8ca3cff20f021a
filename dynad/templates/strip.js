// Thumbnails of any number of images: only those in view exist, and only those are asked for.
const SIDE = 64, GAP = 4, CELL = SIDE + GAP;

function render({ model, el: root }) {
  root.classList.add('dynad-strip');
  const box = document.createElement('div'), inner = document.createElement('div');
  box.className = 'dynad-strip-box'; box.tabIndex = 0; box.setAttribute('role', 'listbox');
  box.setAttribute('aria-label', 'test images; arrow keys choose one');
  inner.className = 'dynad-strip-inner'; box.append(inner); root.append(box);
  const urls = new Map(), asked = new Set(), cells = new Map();
  const columns = () => Math.max(1, Math.floor((box.clientWidth - 4)/CELL));
  const items = () => model.get('items');                     // [image, name, score, wrong]
  let at = new Map();                                         // image -> position

  function layout() {
    const n = items().length, c = columns(); at = new Map(items().map((it, p) => [it[0], p]));
    inner.style.height = `${Math.ceil(n/c)*CELL}px`; cells.forEach((b) => b.remove()); cells.clear(); draw();
  }
  function draw() {
    const c = columns(), list = items(), first = Math.max(0, Math.floor(box.scrollTop/CELL) - 1)*c;
    const last = Math.min(list.length, (Math.ceil((box.scrollTop + box.clientHeight)/CELL) + 1)*c), want = [];
    for (const [p, b] of cells) if (p < first || p >= last) { b.remove(); cells.delete(p); }
    for (let p = first; p < last; p++) {
      const [image, name, score, wrong] = list[p];
      let b = cells.get(p);
      if (!b) {
        b = document.createElement('div'); b.className = 'dynad-thumb'; b.setAttribute('role', 'option');
        b.id = `${id}-${p}`;
        b.style.left = `${(p % c)*CELL}px`; b.style.top = `${Math.floor(p/c)*CELL}px`; b.dataset.image = image;
        b.onclick = () => choose(p); inner.append(b); cells.set(p, b);
      }
      const text = `${name}${score === null ? '' : `: score ${score.toFixed(2)}`}${wrong ? ', wrongly classified' : ''}`;
      b.title = text; b.setAttribute('aria-label', text); b.textContent = wrong ? '✗' : '';
      b.setAttribute('aria-selected', image === model.get('selected'));
      if (urls.has(image)) b.style.backgroundImage = `url(${urls.get(image)})`;
      else if (!asked.has(image)) { asked.add(image); want.push(image); }
    }
    if (want.length) model.send({ want });
  }
  const id = `s${Math.random().toString(36).slice(2)}`;
  function choose(p) {
    const list = items(); if (!list.length) return;
    p = Math.max(0, Math.min(list.length - 1, p)); model.set('selected', list[p][0]); model.save_changes();
  }
  function reveal() {
    const p = at.get(model.get('selected')); if (p === undefined) return draw();
    const y = Math.floor(p/columns())*CELL;
    if (y < box.scrollTop) box.scrollTop = y;
    else if (y + CELL > box.scrollTop + box.clientHeight) box.scrollTop = y + CELL - box.clientHeight;
    draw(); box.setAttribute('aria-activedescendant', `${id}-${p}`);
  }
  box.onkeydown = (e) => {
    const c = columns(), p = at.get(model.get('selected')) ?? 0, page = c*Math.max(1, Math.floor(box.clientHeight/CELL));
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -c, ArrowDown: c, PageUp: -page, PageDown: page, Home: -p, End: items().length }[e.key];
    if (by === undefined) return;
    e.preventDefault(); e.stopPropagation(); choose(p + by);
  };
  let waiting = false;
  box.onscroll = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); } };
  const receive = (msg, buffers) => { (msg.have || []).forEach((image, k) => urls.set(image, URL.createObjectURL(new Blob([buffers[k]])))); draw(); };
  model.on('msg:custom', receive); model.on('change:items', layout); model.on('change:selected', reveal);
  const watch = new ResizeObserver(layout); watch.observe(box);
  layout(); reveal();
  return () => { watch.disconnect(); model.off('msg:custom', receive); model.off('change:items', layout);
    model.off('change:selected', reveal); urls.forEach((u) => URL.revokeObjectURL(u)); };
}
export default { render };
