// An image and what was found on it: wipe, blink, zoom, pan, the value under the pointer, the regions. No network.
const MODES = [['overlay', 'O', 'the overlay'], ['wipe', 'W', 'input left of the line, overlay right of it'],
               ['blink', 'B', 'input and overlay in turn'], ['input', 'I', 'the input alone']];
const HELP = 'Keys: O overlay, W wipe, B blink, I input; + and − zoom, 0 whole image, arrows move, Shift+arrows move the '
  + 'wipe line, N next region. Ctrl+wheel or a double click zooms, dragging moves.';
const el = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text; return e; };

function render({ model, el: root }) {
  root.classList.add('dynad-viewer');
  const bar = el('div', 'dynad-bar'), frame = el('div', 'dynad-frame'), stage = el('div', 'dynad-stage');
  const base = el('img', 'dynad-base'), top = el('img', 'dynad-top'), line = el('div', 'dynad-line');
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const readout = el('output', 'dynad-readout'), list = el('ol', 'dynad-regions'), side = el('div', 'dynad-side');
  const heading = el('b', '', ''), shown = el('div', 'dynad-main');
  frame.tabIndex = 0; frame.setAttribute('role', 'application'); frame.title = HELP;
  readout.setAttribute('aria-live', 'off');
  base.draggable = top.draggable = false;
  stage.append(base, top, svg); frame.append(stage, line); side.append(heading, list);
  shown.append(frame, side); root.append(bar, shown);

  let view = { k: 1, x: 0, y: 0 }, fit = 1, wipe = .5, blinkOn = true, timer = null, values = null, urls = {};
  const size = () => model.get('size');                       // width, height in the image's own pixels
  const buttons = {};
  const button = (text, title, act) => { const b = el('button', 'jupyter-button widget-button', text);
    b.title = title; b.type = 'button'; b.onclick = act; bar.append(b); return b; };
  for (const [mode, key, title] of MODES) buttons[mode] = button(mode, `${title} (${key})`, () => setMode(mode));
  button('−', 'smaller (−)', () => zoom(1/1.5)); button('+', 'larger (+)', () => zoom(1.5));
  button('fit', 'the whole image (0)', () => reset()); bar.append(readout);

  function setMode(mode) { model.set('mode', mode); model.save_changes(); }
  function showMode() {
    const mode = model.get('mode');
    for (const [m, b] of Object.entries(buttons)) { b.setAttribute('aria-pressed', m === mode);
      b.classList.toggle('mod-active', m === mode); }
    clearInterval(timer); blinkOn = true;
    if (mode === 'blink') timer = setInterval(() => { blinkOn = !blinkOn; draw(); }, 700);
    draw();
  }
  function draw() {
    const mode = model.get('mode'), [w, h] = size(), k = fit*view.k;
    stage.style.width = `${w}px`; stage.style.height = `${h}px`;
    stage.style.transform = `translate(${view.x}px,${view.y}px) scale(${k})`;
    stage.classList.toggle('dynad-pixels', k > 3);
    const on = mode !== 'input' && !(mode === 'blink' && !blinkOn);
    top.style.visibility = on ? 'visible' : 'hidden';
    const x = wipe*frame.clientWidth, inside = (x - view.x)/k;
    top.style.clipPath = mode === 'wipe' ? `inset(0 0 0 ${Math.max(0, Math.min(100, 100*inside/w))}%)` : 'none';
    line.style.display = mode === 'wipe' ? 'block' : 'none'; line.style.left = `${x}px`;
    svg.setAttribute('viewBox', `0 0 ${w} ${h}`);
    svg.style.setProperty('--w', `${1.5/k}px`);
  }
  function reset() {
    const [w, h] = size(), W = frame.clientWidth, H = frame.clientHeight;
    if (!W || !H) return;
    fit = Math.min(W/w, H/h); view = { k: 1, x: (W - w*fit)/2, y: (H - h*fit)/2 }; draw();
  }
  function zoom(by, at) {
    const [px, py] = at || [frame.clientWidth/2, frame.clientHeight/2];
    const k = Math.max(.5, Math.min(40, view.k*by)), f = k/view.k;
    view = { k, x: px - (px - view.x)*f, y: py - (py - view.y)*f }; draw();
  }
  function move(dx, dy) { view.x += dx; view.y += dy; draw(); }
  function go(n) {                                             // to a region
    const r = model.get('regions')[n]; if (!r) return;
    const [x, y, w, h] = r.box, W = frame.clientWidth, H = frame.clientHeight;
    const k = Math.min(12, Math.max(1, Math.min(W/(w*4), H/(h*4))/fit));
    view = { k, x: W/2 - (x + w/2)*fit*k, y: H/2 - (y + h/2)*fit*k };
    model.set('selected', n); model.save_changes(); draw();
  }
  const place = (e) => { const b = frame.getBoundingClientRect(); return [e.clientX - b.left, e.clientY - b.top]; };

  let held = null;
  frame.onpointerdown = (e) => { const [x, y] = place(e);
    held = { x, y, line: model.get('mode') === 'wipe' && Math.abs(x - wipe*frame.clientWidth) < 12 };
    frame.setPointerCapture(e.pointerId); frame.focus({ preventScroll: true }); };
  frame.onpointerup = () => { held = null; };
  frame.onpointermove = (e) => { const [x, y] = place(e);
    if (held && held.line) { wipe = Math.max(0, Math.min(1, x/frame.clientWidth)); draw(); }
    else if (held) { move(x - held.x, y - held.y); held.x = x; held.y = y; }
    read(x, y); };
  frame.onpointerleave = () => { readout.textContent = model.get('remark'); };
  frame.ondblclick = (e) => zoom(2, place(e));
  frame.addEventListener('wheel', (e) => { if (!(e.ctrlKey || e.metaKey)) return;
    e.preventDefault(); zoom(Math.exp(-e.deltaY/300), place(e)); }, { passive: false });
  frame.onkeydown = (e) => {
    const step = 40, arrows = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const mode = MODES.find((m) => m[1] === e.key.toUpperCase());
    if (arrows[e.key] && e.shiftKey) { wipe = Math.max(0, Math.min(1, wipe - arrows[e.key][0]*.02)); draw(); }
    else if (arrows[e.key]) move(...arrows[e.key].map((v) => v*step));
    else if (e.key === '+' || e.key === '=') zoom(1.5);
    else if (e.key === '-') zoom(1/1.5);
    else if (e.key === '0') reset();
    else if (e.key.toUpperCase() === 'N' && model.get('regions').length) go((model.get('selected') + 1) % model.get('regions').length);
    else if (mode && !e.ctrlKey && !e.metaKey) setMode(mode[0]);
    else return;
    e.preventDefault(); e.stopPropagation();
  };
  function read(px, py) {
    const [w, h] = size(), k = fit*view.k, x = Math.floor((px - view.x)/k), y = Math.floor((py - view.y)/k);
    if (x < 0 || y < 0 || x >= w || y >= h) { readout.textContent = model.get('remark'); return; }
    const [rows, cols] = model.get('shape'), t = model.get('threshold');
    if (!values || !rows) { readout.textContent = `x ${x}, y ${y}`; return; }
    const v = values[Math.floor(y*rows/h)*cols + Math.floor(x*cols/w)];
    readout.textContent = `x ${x}, y ${y}: A_map ${v.toFixed(2)} ${v > t ? '> ' : '≤ '}${t.toFixed(2)}`;
  }
  function put(img, name) {
    const data = model.get(name); if (!data || !data.byteLength) return;
    const old = urls[name]; urls[name] = URL.createObjectURL(new Blob([data]));
    img.src = urls[name]; if (old) setTimeout(() => URL.revokeObjectURL(old), 2000);
  }
  function setValues() {
    const d = model.get('values');
    values = d && d.byteLength ? new Float32Array(d.buffer.slice(d.byteOffset, d.byteOffset + d.byteLength)) : null;
  }
  function showRegions() {
    svg.replaceChildren(); list.replaceChildren();
    const regions = model.get('regions'), unit = model.get('unit'), chosen = model.get('selected');
    heading.textContent = regions.length ? `${regions.length} marked region${regions.length > 1 ? 's' : ''}` : 'no region is marked';
    regions.forEach((r, n) => {
      const [x, y, w, h] = r.box, box = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
      for (const [k, v] of Object.entries({ x, y, width: w, height: h })) box.setAttribute(k, v);
      if (n === chosen) box.classList.add('dynad-chosen');
      svg.append(box);
      const li = el('li'), b = el('button', '', `peak ${r.peak.toFixed(2)} · ${Math.round(w)} × ${Math.round(h)} ${unit} at ${Math.round(x)}, ${Math.round(y)}`);
      b.type = 'button'; b.title = `area ${Math.round(r.area)} ${unit}²; click to go there`; b.onclick = () => go(n);
      if (n === chosen) b.setAttribute('aria-current', 'true');
      li.append(b); list.append(li);
    });
  }
  const alt = () => { base.alt = model.get('alt'); top.alt = ''; frame.setAttribute('aria-label', model.get('alt')); };
  const hear = { image: () => put(base, 'image'), overlay: () => put(top, 'overlay'), values: setValues, size: reset, alt,
    mode: showMode, regions: () => { showRegions(); draw(); }, selected: showRegions,
    stale: () => top.classList.toggle('dynad-stale', model.get('stale')), remark: () => { readout.textContent = model.get('remark'); } };
  for (const [name, f] of Object.entries(hear)) { model.on(`change:${name}`, f); f(); }
  const watch = new ResizeObserver(() => reset()); watch.observe(frame);
  return () => { watch.disconnect(); clearInterval(timer); for (const [name, f] of Object.entries(hear)) model.off(`change:${name}`, f);
    Object.values(urls).forEach((u) => URL.revokeObjectURL(u)); };
}
export default { render };
