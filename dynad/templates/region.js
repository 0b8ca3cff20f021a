// What counts of an image: outlines drawn with the pointer, filled; everything outside is dimmed. No network.
const HELP = 'Draw around what counts with the pointer held down; several outlines add up. Ctrl+Z takes the last one back.';
const LEAST = 480; // pixels of the page
function render({ model, el: root }) {
  root.classList.add('dynad-region');
  const canvas = document.createElement('canvas'), image = new Image(), g = canvas.getContext('2d');
  canvas.tabIndex = 0; canvas.title = HELP; canvas.setAttribute('role', 'application');
  canvas.setAttribute('aria-label', 'region of interest, drawn by pointer; a mask file can be chosen instead');
  root.append(canvas);
  let line = null, url = null;
  const outline = (points) => { g.beginPath();
    points.forEach(([x, y], k) => g[k ? 'lineTo' : 'moveTo'](x*canvas.width, y*canvas.height)); g.closePath(); };
  function draw() {
    const all = [...model.get('outlines'), ...(line ? [line] : [])];
    g.drawImage(image, 0, 0, canvas.width, canvas.height);
    if (!all.length) return;
    g.fillStyle = '#000a'; g.fillRect(0, 0, canvas.width, canvas.height);
    for (const points of all) { // each by itself: what lies in two of them counts, whichever way they were drawn
      g.save(); outline(points); g.clip(); g.drawImage(image, 0, 0, canvas.width, canvas.height); g.restore(); }
    g.strokeStyle = '#e69f00'; g.lineWidth = 2;
    for (const points of all) { outline(points); g.stroke(); }
  }
  function load() {
    const bytes = model.get('image');
    if (url) URL.revokeObjectURL(url);
    if (!bytes || !bytes.byteLength) { canvas.style.display = 'none'; return; }
    url = URL.createObjectURL(new Blob([bytes], { type: 'image/jpeg' }));
    image.onload = () => { const k = Math.max(1, LEAST/image.naturalWidth); // a small image is drawn on enlarged
      canvas.width = Math.round(k*image.naturalWidth); canvas.height = Math.round(k*image.naturalHeight); canvas.style.display = ''; draw(); };
    image.src = url;
  }
  const at = (e) => { const b = canvas.getBoundingClientRect(), c = (v) => Math.max(0, Math.min(1, v));
    return [c((e.clientX - b.left)/b.width), c((e.clientY - b.top)/b.height)]; };
  const set = (outlines) => { model.set('outlines', outlines); model.save_changes(); };
  canvas.onpointerdown = (e) => { if (e.button) return; canvas.setPointerCapture(e.pointerId); line = [at(e)]; canvas.focus(); };
  canvas.onpointermove = (e) => { if (!line) return; const [x, y] = at(e), [u, v] = line[line.length - 1];
    if (Math.hypot((x - u)*canvas.clientWidth, (y - v)*canvas.clientHeight) > 3) { line.push([x, y]); draw(); } };
  canvas.onpointerup = () => { const done = line; line = null;
    if (done && done.length > 2) set([...model.get('outlines'), done]); else draw(); };
  canvas.onpointercancel = () => { line = null; draw(); };
  canvas.onkeydown = (e) => { if ((e.ctrlKey || e.metaKey) && e.key === 'z') { set(model.get('outlines').slice(0, -1)); e.preventDefault(); } };
  model.on('change:image', load); model.on('change:outlines', draw);
  load();
  return () => { model.off('change:image', load); model.off('change:outlines', draw); if (url) URL.revokeObjectURL(url); };
}
export default { render };
