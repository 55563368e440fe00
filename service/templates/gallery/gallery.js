'use strict';
// The page: tools, counts, what the address says, and going on while a run goes on.

(() => {
  const byId = (id) => document.getElementById(id);
  const { model } = ziplora;
  const choice = { find: '', method: '', score: 'overall', order: 'name', floor: null, heat: false, size: 0 };
  const LIVE_S = 5, QUIET_S = 60, STALE_S = 300;
  let arrangement = null;

  async function start() {
    try {
      await ziplora.load('pages/catalog.js');
    } catch {
      say('This gallery has no data yet.', 'Write it with: ziplora gallery CATALOG');
      return;
    }
    fill();
    draw();
    follow();
    openFromAddress();
    watch();
  }

  function fill() {
    const { page } = model;
    document.title = `${page.title} · gallery`;
    byId('title').textContent = page.title;
    const used = [...new Set([...page.cells.values()].flatMap((cell) => [...cell.entries, ...cell.failures].map((one) => one.method)))];
    const methods = page.methods.filter((method) => used.includes(method));
    const every = el('option', { value: '' }, page.scored && methods.length > 1 ? 'best scored' : 'any');
    byId('method').replaceChildren(...(methods.length === 1 ? [] : [every]), ...methods.map((method) => el('option', { value: method }, method)));
    if (methods.length === 1) choice.method = '';
    byId('method').value = methods.length === 1 ? methods[0] : choice.method;
    byId('method').disabled = methods.length < 2;
    document.body.classList.toggle('unscored', !page.scored);
    byId('compare').hidden = !page.compared;
  }

  function draw() {
    const { page } = model;
    arrangement = ziplora.arrange(page, choice);
    const given = [...page.cells.values()].reduce((n, cell) => n + cell.failures.length, 0);
    const n = (count, one, many = `${one}s`) => `${count.toLocaleString('en')} ${count === 1 ? one : many}`;
    const parts = [
      n(page.merges, 'merge'), `${n(page.subjects.length, 'subject')} × ${n(page.styles.length, 'style')}`,
      ...(given ? [`${given.toLocaleString('en')} given up`] : []),
      ...(page.unreadable ? [`${page.unreadable} not readable`] : []),
      ...(arrangement.filtered ? [`${arrangement.shown.toLocaleString('en')} shown`] : []),
    ];
    byId('counts').replaceChildren(...parts.map((part) => el('span', {}, part)));
    const nothing = !arrangement.rows.length || !arrangement.columns.length;
    byId('viewport').hidden = nothing;
    byId('empty').hidden = !nothing;
    if (!page.cells.size) say('Nothing is merged yet.', model.live && model.live.state === 'running' ? 'A run is under way; pictures appear here as they are made.' : 'Run a manifest with: ziplora run MANIFEST');
    else if (nothing) say('Nothing matches.', 'Try fewer words or a lower score.', el('button', { type: 'button', class: 'quiet', onclick: reset }, 'Show all'));
    legend();
    byId('floor-value').value = choice.floor === null ? 'any' : ziplora.shortly(choice.floor);
    if (nothing) return;
    ziplora.grid.show(page, arrangement, choice);
    if (!choice.size) byId('size').value = ziplora.grid.size;
  }

  function legend() {
    const shown = choice.heat && model.page.scored;
    byId('legend').hidden = !shown;
    byId('legend-low').textContent = ziplora.shortly(arrangement.low);
    byId('legend-high').textContent = ziplora.shortly(arrangement.high);
    byId('legend-name').textContent = choice.score === 'overall' ? 'overall: harmonic mean of style and subject' : byId('score').selectedOptions[0].textContent;
  }

  function say(title, text, ...more) {
    byId('viewport').hidden = true;
    byId('empty').hidden = false;
    byId('empty').replaceChildren(el('h2', {}, title), el('p', {}, text), ...more);
  }

  function reset() {
    Object.assign(choice, { find: '', floor: null });
    byId('find').value = '';
    byId('floor').value = 0;
    draw();
    byId('find').focus();
  }

  // Tools

  const soon = (() => { let timer = 0; return () => { clearTimeout(timer); timer = setTimeout(draw, 80); }; })();
  byId('find').addEventListener('input', () => { choice.find = byId('find').value; soon(); });
  for (const name of ['method', 'score', 'order']) {
    byId(name).addEventListener('change', () => {
      choice[name] = byId(name).value;
      if (name === 'score') { choice.floor = null; byId('floor').value = 0; }
      draw();
    });
  }
  byId('floor').addEventListener('input', () => {
    const [low, high] = extent();
    const share = Number(byId('floor').value) / 100;
    choice.floor = share ? low + share * (high - low) : null;
    soon();
  });
  byId('heat').addEventListener('change', () => { choice.heat = byId('heat').checked; draw(); });
  byId('size').addEventListener('input', () => { choice.size = Number(byId('size').value); soon(); });
  byId('tools').addEventListener('submit', (event) => event.preventDefault());
  byId('more').addEventListener('click', () => {
    const open = byId('tools').classList.toggle('open');
    byId('more').setAttribute('aria-expanded', String(open));
  });
  document.addEventListener('keydown', (event) => {
    if (event.key === '/' && !ziplora.detail.isOpen && !event.target.matches('input, select')) { event.preventDefault(); byId('find').focus(); }
    if (event.key === 'Escape') ziplora.grid.hide();
  });

  function extent() {
    const values = [...model.page.cells.values()].flatMap((cell) => cell.entries.map((entry) => entry.scores[choice.score])).filter((value) => value !== null);
    return values.length ? [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))] : [0, 1];
  }

  // One pair, and the address that leads to it

  ziplora.grid.onOpen = show;
  function show(view) {
    const { page } = model;
    const address = `#${encodeURIComponent(page.subjects[view.cell.row])}/${encodeURIComponent(page.styles[view.cell.column])}`;
    if (location.hash !== address) history.replaceState(null, '', address);
    ziplora.detail.open(page, view, choice);
  }
  ziplora.detail.onStep = (step) => {
    const next = ziplora.grid.neighbour(step);
    if (next) { ziplora.grid.go(next.place); show(next.view); }
  };
  ziplora.detail.onClosed = () => {
    history.replaceState(null, '', location.pathname + location.search);
    draw();  // what came while it was open
    if (!byId('viewport').hidden) ziplora.grid.focus();
  };

  function openFromAddress() {
    let names;
    try { names = location.hash.slice(1).split('/').map(decodeURIComponent); } catch { return; }
    const { page } = model;
    const place = names.length === 2 && ziplora.grid.find(page.subjects.indexOf(names[0]), page.styles.indexOf(names[1]));
    if (!place) return;
    ziplora.grid.go(place);
    if (ziplora.grid.here()) show(ziplora.grid.here());
  }
  addEventListener('hashchange', openFromAddress);

  // While a run goes on

  async function watch() {
    let wait = QUIET_S;
    try {
      await ziplora.load(`pages/live.js?${Date.now()}`);
      const { live } = model;
      if (live) {
        if (live.digest !== model.page.digest || live.given_up !== model.page.failures.length) await reload();
        wait = fresh(live) ? LIVE_S : QUIET_S;
      }
      follow();
    } catch {  // no run has left word here
    }
    setTimeout(watch, wait * 1000);
  }

  async function reload() {
    const before = model.page.digest;
    await ziplora.load(`pages/catalog.js?${Date.now()}`);
    if (model.page.digest === before && model.page.failures.length === 0) return;
    fill();
    if (!ziplora.detail.isOpen) draw();
  }

  const fresh = (live) => live.state === 'running' && Date.now() - Date.parse(live.updated) < STALE_S * 1000;

  function follow() {
    const { live } = model;
    const running = Boolean(live) && live.state === 'running';
    byId('progress').hidden = !running;
    if (!running) return;
    const done = live.committed + live.given_up;
    const [track, text] = byId('progress').children;
    track.setAttribute('aria-valuemax', live.jobs);
    track.setAttribute('aria-valuenow', done);
    track.firstElementChild.style.width = `${live.jobs ? (100 * done) / live.jobs : 0}%`;
    text.textContent = [
      `${done.toLocaleString('en')} of ${live.jobs.toLocaleString('en')} done`,
      live.given_up ? `${live.given_up} given up` : '',
      fresh(live) ? (live.eta_s === null ? '' : `about ${span(live.eta_s)} left`) : `no word since ${live.updated.slice(11, 16)} UTC`,
    ].filter(Boolean).join(' · ');
  }

  function span(seconds) {
    if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
    return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
  }

  start();
})();
