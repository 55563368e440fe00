'use strict';
// The comparison of methods. Everything that a user named is set as text, never as markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const page = JSON.parse(byId('data').textContent);
  const STEP = 60;  // pairs shown at a time
  const state = { view: 'measures', sort: null, descending: true, find: '', order: 'name', shown: STEP };
  let active = { i: 0, j: 0 };

  const n = (count, one) => `${count.toLocaleString('en')} ${one}${count === 1 ? '' : 's'}`;
  const at = (value, digits, sign = '') => `${value > 0 ? sign : ''}${value.toFixed(digits)}`;

  function start() {
    document.title = `${page.title} · methods compared`;
    byId('about').textContent = [page.title, n(page.rows.length, 'method'), n(page.sheet.pairs.length, 'pair'), page.updated].filter(Boolean).join(' · ');
    byId('gallery').hidden = !page.gallery;
    document.body.classList.toggle('unscored', !page.measures.some(({ name }) => name === 'harmonic'));
    byId('view').hidden = !page.rows.some((row) => Object.keys(row.minus).length);
    byId('minus-label').textContent = `difference to ${page.against}`;
    byId('notes').replaceChildren(...page.notes.map((note) => el('li', {}, note)));
    byId('legend').replaceChildren(...page.measures.flatMap((one) => [el('dt', {}, one.label), el('dd', {}, `${one.about}; ${one.better > 0 ? 'more is better' : 'less is better'}`)]),
      el('dt', {}, 'bars'), el('dd', {}, page.legend));
    byId('source').textContent = `${page.source}.`;
    table();
    published();
    missing();
    sheet();
  }

  // In the mean

  function table() {
    const rows = page.rows.filter((row) => state.view === 'measures' || row.variant === page.against || Object.keys(row.minus).length);
    if (state.sort) {
      const key = (row) => (row[state.view][state.sort] || row.measures[state.sort] || [null])[0];
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return state.descending ? y - x : x - y;
      });
    }
    const scales = Object.fromEntries(page.measures.map((one) => [one.name, scale(one.name)]));
    byId('table').tHead.replaceChildren(el('tr', {}, el('th', { scope: 'col' }, 'method'), ...page.measures.map(head),
      ...(page.common && state.view === 'measures' ? [el('th', { scope: 'col', title: 'pairs on which its style × subject is the highest' }, `first of ${n(page.common, 'pair')}`)] : []),
      ...page.architectures.map(([, name]) => el('th', { scope: 'col' }, `published on ${name}`, el('br'), 'style / subject / text'))));
    byId('table').tBodies[0].replaceChildren(...rows.map((row) => el('tr', {},
      el('th', { scope: 'row' }, row.variant, el('small', {}, `${n(row.pairs, 'pair')}${row.merges > row.pairs ? `, ${n(row.merges, 'merge')}` : ''}`)),
      ...page.measures.map((one) => value(row, one, scales[one.name])),
      ...(page.common && state.view === 'measures' ? [el('td', {}, row.measures.harmonic ? `${row.first_on}` : '–')] : []),
      ...page.architectures.map(([key]) => el('td', { class: 'soft' }, triple(row.published[key]))))));
  }

  const triple = (values) => (values ? values.map((one) => one.toFixed(3)).join(' / ') : '–');

  function head(one) {
    const sorted = state.sort === one.name ? (state.descending ? 'descending' : 'ascending') : 'none';
    const button = el('button', { type: 'button', title: `sort by ${one.label}`, onclick() {
      state.descending = state.sort === one.name ? !state.descending : one.better > 0;
      state.sort = one.name;
      table();
      byId('table').tHead.querySelectorAll('button')[page.measures.indexOf(one)].focus();
    } }, one.label);
    return el('th', { scope: 'col', 'aria-sort': sorted }, button);
  }

  function value(row, one, range) {
    const found = row[state.view][one.name];
    if (!found) return el('td', { class: 'soft' }, state.view === 'minus' && row.variant === page.against ? 'baseline' : '–');
    const [mean, low, high] = found;
    const sign = state.view === 'minus' ? '+' : '';
    const cell = el('td', {}, el('b', {}, at(mean, one.digits, sign)));
    if (low !== null) {
      cell.append(bar(mean, low, high, range), el('small', {}, `${at(low, one.digits, sign)} … ${at(high, one.digits, sign)}`));
      if (state.view === 'minus' && (low > 0 || high < 0)) cell.classList.add('sure');
    }
    return cell;
  }

  function scale(name) {
    const values = page.rows.flatMap((row) => (row[state.view][name] || []).filter((one) => one !== null));
    if (state.view === 'minus') values.push(0);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return [low, high - low || 1];
  }

  function bar(mean, low, high, [least, width]) {
    const x = (one) => 4 + (124 * (one - least)) / width;
    const svg = (tag, attributes) => {
      const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
      for (const [key, one] of Object.entries(attributes)) made.setAttribute(key, one);
      return made;
    };
    const made = svg('svg', { viewBox: '0 0 132 14', 'aria-hidden': 'true' });
    if (state.view === 'minus') made.append(svg('line', { x1: x(0), x2: x(0), y1: 0, y2: 14, class: 'zero' }));
    made.append(svg('line', { x1: x(low), x2: x(high), y1: 7, y2: 7 }), svg('circle', { cx: x(mean), cy: 7, r: 3.5 }));
    return made;
  }

  function published() {
    byId('published').tHead.replaceChildren(el('tr', {}, ...['published', ...page.architectures.map(([, name]) => `${name}: style / subject / text`), 'ZipLoRA preferred over it', 's per pair, one A100', 'here']
      .map((title) => el('th', { scope: 'col' }, title))));
    byId('published').tBodies[0].replaceChildren(...page.published.map((one) => el('tr', {}, el('th', { scope: 'row' }, one.name),
      ...page.architectures.map(([key]) => el('td', {}, triple(one.alignments[key]))),
      el('td', {}, one.preferred === null ? '–' : `${(100 * one.preferred).toFixed(1)} %`), el('td', {}, one.seconds === null ? '–' : `${one.seconds}`),
      el('td', { class: 'soft' }, page.rows.some((row) => row.method === one.method) ? 'yes' : 'not in this catalog'))));
  }

  function missing() {
    const found = page.rows.filter((row) => row.missing.length);
    byId('missing').replaceChildren(...found.map((row) => el('details', {}, el('summary', {}, `${row.variant}: ${n(row.missing.length, 'pair')} missing`),
      el('ul', {}, ...row.missing.slice(0, 500).map(([subject, style, reason]) => el('li', {}, `${subject} × ${style}: ${reason === null ? 'not merged' : `given up, ${reason}`}`)),
        ...(row.missing.length > 500 ? [el('li', {}, `… and ${row.missing.length - 500} more`)] : [])))));
  }

  // Pair by pair

  const overall = (cell) => (cell && cell.length > 1 ? cell[2] : null);
  const scores = (pair) => pair[2].map(overall).filter((one) => one !== null);
  const spread = (pair) => { const all = scores(pair); return all.length > 1 ? Math.max(...all) - Math.min(...all) : -1; };
  const mean = (pair) => { const all = scores(pair); return all.length ? all.reduce((a, b) => a + b) / all.length : -Infinity; };

  function chosen() {
    const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
    const pairs = page.sheet.pairs.filter(([subject, style]) => words.every((word) => `${subject}\n${style}`.toLowerCase().includes(word)));
    const keys = { spread: (pair) => -spread(pair), best: (pair) => -mean(pair), worst: (pair) => (scores(pair).length ? mean(pair) : Infinity) };
    const key = keys[state.order];
    return key ? pairs.map((pair) => [key(pair), pair]).sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0)).map(([, pair]) => pair) : pairs;
  }

  function sheet() {
    const inside = byId('sheet').contains(document.activeElement); // what is drawn anew would lose it
    const pairs = chosen();
    const shown = pairs.slice(0, state.shown);
    byId('shown').textContent = pairs.length === shown.length ? n(pairs.length, 'pair') : `${shown.length} of ${n(pairs.length, 'pair')}`;
    byId('more').hidden = shown.length === pairs.length;
    byId('sheet').setAttribute('aria-rowcount', pairs.length + 1);
    byId('sheet').tHead.replaceChildren(el('tr', { role: 'row' }, el('th', { scope: 'col' }, 'pair'), ...page.sheet.variants.map((variant) => el('th', { scope: 'col' }, variant))));
    byId('sheet').tBodies[0].replaceChildren(...shown.map((pair, i) => el('tr', { role: 'row' },
      el('th', { scope: 'row' }, pair[0], el('small', {}, pair[1])), ...pair[2].map((cell, j) => el('td', { role: 'gridcell' }, picture(pair, cell, i, j))))));
    active = { i: Math.min(active.i, Math.max(0, shown.length - 1)), j: active.j };
    const cell = rove();
    if (inside && cell) cell.focus();
  }

  function picture(pair, cell, i, j) {
    const variant = page.sheet.variants[j];
    const label = `${pair[0]} in ${pair[1]}, ${variant}`;
    const place = { 'data-i': i, 'data-j': j, tabIndex: -1 };
    if (!cell || cell.length === 1) {
      const why = cell ? `given up: ${cell[0]}` : 'not merged';
      return el('div', { class: 'cell', ...place, 'aria-label': `${label}: ${why}` }, el('div', { class: 'blank' }, why));
    }
    const [id, source, value] = cell;
    const first = value !== null && scores(pair).length > 1 && value === Math.max(...scores(pair));
    const inside = source === 0
      ? el('div', { class: 'blank' }, 'no picture')
      : el('img', { src: source === 1 ? `pages/thumbs/${id}.webp` : source, alt: label, loading: 'lazy', decoding: 'async', width: 140, height: 140,
        onload() { this.classList.toggle('crisp', Math.max(this.naturalWidth, this.naturalHeight) <= 128); },
        onerror() { this.replaceWith(el('div', { class: 'blank' }, 'picture not here')); } });
    const made = el(page.gallery ? 'a' : 'div', { class: `cell${first ? ' first' : ''}`, ...place, 'aria-label': `${label}${value === null ? '' : `, ${value.toFixed(3)}`}${first ? ', the highest' : ''}` },
      inside, el('span', {}, el('b', {}, value === null ? '' : value.toFixed(3)), first ? 'highest' : ''));
    if (page.gallery) made.href = `gallery.html#${encodeURIComponent(pair[0])}/${encodeURIComponent(pair[1])}`;
    return made;
  }

  // One stop for the tabulator in the whole sheet, arrow keys inside

  const cellAt = ({ i, j }) => byId('sheet').querySelector(`.cell[data-i="${i}"][data-j="${j}"]`);
  function rove() {
    for (const other of byId('sheet').querySelectorAll('.cell[tabindex="0"]')) other.tabIndex = -1;
    const cell = cellAt(active);
    if (cell) cell.tabIndex = 0;
    return cell;
  }
  byId('sheet').addEventListener('keydown', (event) => {
    const last = page.sheet.variants.length - 1;
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -last], End: [0, last] };
    if (event.altKey || !(event.key in steps)) return;
    event.preventDefault();
    const next = { i: active.i + steps[event.key][0], j: Math.max(0, Math.min(last, active.j + steps[event.key][1])) };
    if (!cellAt(next)) return;
    active = next;
    rove().focus();
  });
  byId('sheet').addEventListener('focusin', (event) => {
    const cell = event.target.closest('.cell');
    if (cell) { active = { i: Number(cell.dataset.i), j: Number(cell.dataset.j) }; rove(); }
  });

  let timer = 0;
  byId('find').addEventListener('input', () => { state.find = byId('find').value; state.shown = STEP; clearTimeout(timer); timer = setTimeout(sheet, 80); });
  byId('order').addEventListener('change', () => { state.order = byId('order').value; state.shown = STEP; sheet(); });
  byId('more').addEventListener('click', () => { active = { i: state.shown, j: 0 }; state.shown += STEP; sheet(); rove().focus(); });
  byId('tools').addEventListener('submit', (event) => event.preventDefault());
  byId('view').addEventListener('change', (event) => { state.view = event.target.value; table(); });

  start();
})();
