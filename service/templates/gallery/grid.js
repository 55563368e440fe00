'use strict';
// The grid: only what is in view exists as elements, so that 10,000 cells scroll as nine do. One cell takes the focus.

ziplora.grid = (() => {
  const viewport = document.getElementById('viewport');
  const canvas = document.getElementById('canvas');
  const tip = document.getElementById('tip');
  const MARGIN = 1;  // rows and columns made beyond the edges of the view
  const GAP = 6;
  const made = new Map();  // elements by 'row', 'row/column' or '/column' (places in the arrangement)
  let arrangement = null, page = null, choice = null, layout = null;
  let active = { i: 0, j: 0 };
  let hovered = null, frame = 0, onOpen = () => {};

  function measure() {
    const narrow = viewport.clientWidth < 640;
    const pictured = Object.keys(page.references).length > 0;
    const head = narrow ? 0 : Math.min(200, Math.max(pictured ? 160 : 120, viewport.clientWidth * 0.13));
    const strip = narrow ? 30 : 0;
    const columns = Math.max(1, arrangement.columns.length);
    const fit = Math.floor((viewport.clientWidth - (narrow ? 16 : head + 40)) / columns) - GAP;
    const left = narrow ? 0 : head + GAP;
    // a grid of few rows is seen as a whole where that leaves the pictures large enough
    const top = page.styles.some((style) => page.references[name('style', style)]) ? 68 : 38;
    const tall = !narrow && arrangement.rows.length <= 4 ? Math.floor((viewport.clientHeight - top) / Math.max(1, arrangement.rows.length)) - GAP : Infinity;
    const size = choice.size || Math.min(narrow ? 240 : 248, Math.max(narrow ? 108 : 160, Math.min(fit, tall)));
    layout = { narrow, head, left, strip, size, top, step: size + GAP, row: size + GAP + strip };
    canvas.style.width = `${left + columns * layout.step}px`;
    canvas.style.height = `${top + arrangement.rows.length * layout.row + GAP}px`;
    canvas.style.setProperty('--cell', `${size}px`);
    canvas.style.setProperty('--head', `${head}px`);
    canvas.style.setProperty('--strip', `${strip}px`);
    canvas.style.setProperty('--top', `${top}px`);
    canvas.classList.toggle('narrow', narrow);
    canvas.classList.toggle('heated', choice.heat);
    return layout;
  }

  const name = (role, id) => `${role}-${id.replace(/[^A-Za-z0-9_-]/g, '_')}`;

  function show(nextPage, nextArrangement, nextChoice) {
    const kept = focused();
    [page, arrangement, choice] = [nextPage, nextArrangement, nextChoice];
    active = { i: clamp(active.i, arrangement.rows.length), j: clamp(active.j, arrangement.columns.length) };
    for (const element of made.values()) element.remove();
    made.clear();
    viewport.setAttribute('aria-rowcount', arrangement.rows.length + 1);
    viewport.setAttribute('aria-colcount', arrangement.columns.length + 1);
    measure();
    draw();
    if (kept) focus();
  }

  const clamp = (value, n) => Math.max(0, Math.min(value, n - 1));
  const focused = () => Boolean(document.activeElement && document.activeElement.closest('#canvas'));

  function range(offset, length, step, n) {
    const first = Math.max(0, Math.floor(offset / step) - MARGIN);
    return [first, Math.min(n - 1, Math.ceil((offset + length) / step) + MARGIN)];
  }

  function draw() {
    frame = 0;
    if (!arrangement) return;
    const { rows, columns } = arrangement;
    const [top, bottom] = range(viewport.scrollTop, viewport.clientHeight, layout.row, rows.length);
    const [left, right] = range(viewport.scrollLeft, viewport.clientWidth - layout.head, layout.step, columns.length);
    const wanted = new Set(['head']);
    const across = [];
    for (let j = left; j <= right; j += 1) across.push(j);
    if (columns.length && (active.j < left || active.j > right)) across.push(active.j);
    for (const j of across) wanted.add(`/${j}`);
    const down = [];
    for (let i = top; i <= bottom; i += 1) down.push(i);
    if (rows.length && (active.i < top || active.i > bottom)) down.push(active.i);
    for (const i of down) {
      wanted.add(`${i}`);
      for (const j of across) wanted.add(`${i}/${j}`);
    }
    for (const [key, element] of made) {
      if (!wanted.has(key)) { element.remove(); made.delete(key); }
    }
    const heads = get('head', () => canvas.appendChild(el('div', { class: 'heads', role: 'row', 'aria-rowindex': 1 },
      el('div', { class: 'corner', role: 'columnheader', 'aria-colindex': 1 }, el('span', { class: 'sr' }, 'subject')))));
    for (const j of across) get(`/${j}`, () => heads.appendChild(columnHead(j)));
    for (const i of down) {
      const row = get(`${i}`, () => canvas.appendChild(rowOf(i)));
      for (const j of across) get(`${i}/${j}`, () => row.appendChild(cellOf(i, j)));
    }
  }

  function get(key, make) {
    if (!made.has(key)) made.set(key, make());
    return made.get(key);
  }

  const left = (j) => layout.left + j * layout.step;

  function columnHead(j) {
    const style = page.styles[arrangement.columns[j]];
    return el('div', { class: 'head', role: 'columnheader', 'aria-colindex': j + 2, title: style, style: `left:${left(j)}px` },
      ...reference('style', style), el('span', {}, style));
  }

  function rowOf(i) {
    const subject = page.subjects[arrangement.rows[i]];
    return el('div', { class: 'row', role: 'row', 'aria-rowindex': i + 2, style: `top:${layout.top + i * layout.row}px` },
      el('div', { class: 'head', role: 'rowheader', 'aria-colindex': 1, title: subject }, ...reference('subject', subject), el('span', {}, subject)));
  }

  function reference(role, id) {
    const key = page.references[name(role, id)];
    return key ? [el('img', { class: 'reference', src: ziplora.url(key), alt: `reference picture of ${id}`, loading: 'lazy', decoding: 'async', onload: crisp })] : [];
  }

  // Pictures of few pixels are enlarged by the pixel.
  function crisp() { this.classList.toggle('crisp', Math.max(this.naturalWidth, this.naturalHeight) <= 128); }
  ziplora.crisp = crisp;

  function cellOf(i, j) {
    const [row, column] = [arrangement.rows[i], arrangement.columns[j]];
    const view = arrangement.at(row, column);
    const label = labelOf(row, column, view);
    const element = el('div', {
      class: 'cell', role: 'gridcell', 'aria-colindex': j + 2, style: `left:${left(j)}px`,
      tabIndex: i === active.i && j === active.j ? 0 : -1, 'aria-label': label,
    });
    element.dataset.i = i;
    element.dataset.j = j;
    if (!view) {
      element.classList.add('blank');
      return element;
    }
    element.classList.toggle('faint', !view.matches);
    if (view.entry && view.entry.shown) {
      element.append(el('img', {
        src: `pages/thumbs/${view.entry.id}.webp`, alt: label, width: layout.size, height: layout.size,
        loading: 'lazy', decoding: 'async', draggable: false, onload: crisp, onerror() { this.replaceWith(el('span', { class: 'nopicture' }, 'picture not here')); },
      }));
    } else if (view.entry) {
      element.append(el('span', { class: 'nopicture' }, 'no picture'));
    } else {
      element.classList.add('failed');
      element.append(el('span', { class: 'why' }, el('b', {}, 'given up'), el('span', {}, view.failures[0].reason)));
    }
    const others = new Set(view.cell.entries.map((entry) => entry.method)).size;
    if (others > 1) element.append(el('span', { class: 'several', title: `${others} methods` }, `${others}`));
    if (choice.heat && view.value !== null) {
      const { fill, ink } = ziplora.heat((view.value - arrangement.low) / (arrangement.high - arrangement.low || 1));
      element.append(el('span', { class: 'heat', style: `background:${fill};color:${ink}` }, ziplora.shortly(view.value)));
    }
    return element;
  }

  function labelOf(row, column, view) {
    const pair = `${page.subjects[row]} in ${page.styles[column]}`;
    if (!view) return `${pair}: not merged`;
    if (!view.entry) return `${pair}: given up, ${view.failures[0].reason}`;
    const value = view.value === null ? '' : `, ${choice.score} ${ziplora.shortly(view.value)}`;
    return `${pair}, ${view.entry.method}${value}`;
  }

  // The card beside a cell that the pointer or the focus is on

  function point(element) {
    if (hovered) hovered.removeAttribute('aria-describedby');
    hovered = element;
    const view = element && arrangement.at(arrangement.rows[element.dataset.i], arrangement.columns[element.dataset.j]);
    if (!view) { tip.hidden = true; return; }
    const entry = view.entry;
    const title = el('b', {}, `${page.subjects[view.cell.row]} × ${page.styles[view.cell.column]}`);
    if (entry) {
      const scores = [['style', entry.scores.style], ['subject', entry.scores.subject], ['text', entry.scores.text]].filter(([, value]) => value !== null);
      tip.replaceChildren(title, el('p', { class: 'prompt' }, entry.prompt || 'no sample'),
        el('p', { class: 'small' }, [entry.method, entry.sampleSeed === null ? '' : `sample seed ${entry.sampleSeed}`].filter(Boolean).join(' · ')),
        ...(scores.length ? [el('p', { class: 'small scores' }, ...scores.map(([label, value]) => el('span', {}, `${label} `, el('b', {}, ziplora.shortly(value)))))] : []));
    } else {
      tip.replaceChildren(title, el('p', { class: 'small' }, `given up after ${view.failures[0].attempts} ${view.failures[0].attempts === 1 ? 'attempt' : 'attempts'}`), el('p', {}, view.failures[0].reason));
    }
    element.setAttribute('aria-describedby', 'tip');
    tip.hidden = false;
    const box = element.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const beside = box.right + 10 + own.width < innerWidth ? box.right + 10 : box.left - own.width - 10;
    const x = beside >= 4 ? beside : Math.max(4, Math.min(innerWidth - own.width - 4, box.left));
    const y = beside >= 4 ? box.top : box.bottom + 8;
    tip.style.left = `${x}px`;
    tip.style.top = `${Math.max(4, Math.min(innerHeight - own.height - 4, y))}px`;
  }

  const hide = () => point(null);

  // Walking

  function focus() {
    draw();
    const element = made.get(`${active.i}/${active.j}`);
    if (!element) return;
    for (const other of canvas.querySelectorAll('.cell[tabindex="0"]')) other.tabIndex = -1;
    element.tabIndex = 0;
    reveal();
    element.focus({ preventScroll: true });
  }

  function reveal() {
    const [x, y] = [left(active.j), layout.top + active.i * layout.row];
    if (x - layout.left < viewport.scrollLeft) viewport.scrollLeft = x - layout.left;
    if (x + layout.step > viewport.scrollLeft + viewport.clientWidth) viewport.scrollLeft = x + layout.step - viewport.clientWidth;
    if (y - layout.top < viewport.scrollTop) viewport.scrollTop = y - layout.top;
    if (y + layout.row > viewport.scrollTop + viewport.clientHeight) viewport.scrollTop = y + layout.row - viewport.clientHeight;
  }

  function walk(event) {
    const { rows, columns } = arrangement;
    const screen = Math.max(1, Math.floor((viewport.clientHeight - layout.top) / layout.row));
    const far = event.ctrlKey || event.metaKey;
    const steps = {
      ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
      PageUp: [-screen, 0], PageDown: [screen, 0],
      Home: [far ? -rows.length : 0, -columns.length], End: [far ? rows.length : 0, columns.length],
    };
    if (event.altKey || !(event.key in steps)) {
      if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); open(event.target); }
      return;
    }
    event.preventDefault();
    move(...steps[event.key]);
  }

  function move(down, right) {
    active = { i: clamp(active.i + down, arrangement.rows.length), j: clamp(active.j + right, arrangement.columns.length) };
    focus();
  }

  function open(element) {
    const cell = element.closest('.cell');
    if (!cell) return;
    active = { i: Number(cell.dataset.i), j: Number(cell.dataset.j) };
    hide();
    if (here()) onOpen(here());
    else focus();
  }

  const here = () => arrangement.at(arrangement.rows[active.i], arrangement.columns[active.j]);

  // The nearest cell with something in it, in reading order; for the dialog's previous and next.
  function neighbour(step) {
    const n = arrangement.rows.length * arrangement.columns.length;
    for (let k = active.i * arrangement.columns.length + active.j + step; k >= 0 && k < n; k += step) {
      const place = { i: Math.floor(k / arrangement.columns.length), j: k % arrangement.columns.length };
      const view = arrangement.at(arrangement.rows[place.i], arrangement.columns[place.j]);
      if (view && view.matches) return { place, view };
    }
    return null;
  }

  function go({ i, j }) { active = { i, j }; draw(); reveal(); }

  function find(row, column) {
    const place = { i: arrangement.rows.indexOf(row), j: arrangement.columns.indexOf(column) };
    return place.i >= 0 && place.j >= 0 ? place : null;
  }

  const later = () => { if (!frame) frame = requestAnimationFrame(draw); };
  viewport.addEventListener('scroll', () => {
    later();
    if (hovered && hovered === document.activeElement && hovered.matches(':focus-visible')) point(hovered);  // its own scrolling
    else tip.hidden = true;
  }, { passive: true });
  new ResizeObserver(() => { if (arrangement) show(page, arrangement, choice); }).observe(viewport);
  canvas.addEventListener('keydown', walk);
  canvas.addEventListener('click', (event) => open(event.target));
  canvas.addEventListener('pointerover', (event) => { if (event.pointerType === 'mouse') point(event.target.closest('.cell')); });
  canvas.addEventListener('pointerleave', hide);
  canvas.addEventListener('focusin', (event) => {
    const cell = event.target.closest('.cell');
    if (cell && cell.matches(':focus-visible')) point(cell);
  });
  canvas.addEventListener('focusout', hide);

  return { show, focus, go, find, neighbour, here, hide, reference, get size() { return layout.size; }, set onOpen(handler) { onOpen = handler; } };
})();
