'use strict';
// One pair, looked at closely: methods side by side at one prompt, seed and style strength; what is known of the merge.

ziplora.detail = (() => {
  const dialog = document.getElementById('detail');
  let shown = null;   // {page, view, merges: [{entry, about}], chosen, prompt, seed, strength}
  let onStep = () => {}, onClosed = () => {}, number = 0;

  async function open(page, view, choice) {
    const ours = number += 1;
    shown = { page, view, merges: [], chosen: 0, prompt: null, seed: null, strength: null };
    frame(el('p', { class: 'wait' }, 'loading …'));
    if (!dialog.open) dialog.showModal();
    const found = await Promise.all(view.cell.entries.map(async (entry) => {
      try { return { entry, about: await ziplora.details(entry) }; } catch { return { entry, about: null }; }
    }));
    if (ours !== number) return;
    shown.merges = found.sort((a, b) => page.methods.indexOf(a.entry.method) - page.methods.indexOf(b.entry.method) || (a.entry.seed || 0) - (b.entry.seed || 0));
    shown.chosen = Math.max(0, shown.merges.findIndex(({ entry }) => view.entry && entry.id === view.entry.id));
    const samples = all();
    if (samples.length) {
      const [, prompt, , seed] = samples[0];
      const strengths = samples.map(([, , strength]) => strength);
      Object.assign(shown, { prompt, seed, strength: strengths.includes(1) ? 1 : Math.max(...strengths) });
    }
    frame(...parts());
    draw();
  }

  const all = () => shown.merges.flatMap(({ about }) => (about ? about.samples : []));
  const told = (strength) => (Number.isInteger(strength) ? strength.toFixed(1) : `${strength}`);
  const distinct = (place) => [...new Set(all().map((sample) => sample[place]))];

  function frame(...children) {
    const { page, view } = shown;
    const [subject, style] = [page.subjects[view.cell.row], page.styles[view.cell.column]];
    const had = dialog.contains(document.activeElement) && document.activeElement.dataset.key;
    dialog.replaceChildren(
      el('div', { class: 'bar' }, ...ziplora.grid.reference('subject', subject), ...ziplora.grid.reference('style', style),
        el('h2', { id: 'detail-title' }, subject, el('i', { 'aria-label': 'in' }, ' × '), style),
        button('previous', '‹', 'Previous pair', () => onStep(-1)),
        button('next', '›', 'Next pair', () => onStep(1)),
        button('close', '×', 'Close', () => dialog.close())),
      ...children);
    const again = had && dialog.querySelector(`[data-key="${had}"]`);
    if (again) again.focus();
  }

  function button(key, text, label, onclick) {
    const made = el('button', { type: 'button', class: 'round', 'aria-label': label, title: label, onclick }, text);
    made.dataset.key = key;
    return made;
  }

  function parts() {
    const { view } = shown;
    const failures = view.cell.failures.map((failure) => el('section', { class: 'failure' },
      el('h3', {}, `Given up: ${failure.method}`), el('p', {}, failure.reason),
      el('p', { class: 'small' }, `${failure.kind}, after ${failure.attempts} ${failure.attempts === 1 ? 'attempt' : 'attempts'}. Mend the cause, then run the manifest again.`)));
    if (!shown.merges.length) return [el('div', { class: 'body single' }, ...failures)];
    return [el('div', { class: 'body' },
      el('div', { class: 'left' }, el('div', { class: 'stage' }), el('div', { class: 'controls' }, ...controls()), el('div', { class: 'strip', role: 'group', 'aria-label': 'All samples' })),
      el('div', { class: 'facts' }, ...failures))];
  }

  function controls() {
    const found = [];
    const strengths = distinct(2).sort((a, b) => a - b);
    if (strengths.length > 1) {
      const output = el('output', {}, told(shown.strength));
      const input = el('input', {
        type: 'range', min: 0, max: strengths.length - 1, step: 1, id: 'strength', 'aria-valuetext': told(shown.strength),
        oninput() { shown.strength = strengths[this.value]; output.value = told(shown.strength); this.setAttribute('aria-valuetext', output.value); draw(); },
      });
      input.value = strengths.indexOf(shown.strength);
      input.dataset.key = 'strength';
      found.push(el('label', { class: 'slide' }, el('span', {}, 'Style strength ', output), input,
        el('span', { class: 'ticks', 'aria-hidden': 'true' }, ...strengths.map((strength) => el('i', {}, told(strength))))));
    } else if (strengths.length) {
      found.push(el('p', { class: 'small' }, `Style strength ${told(strengths[0])}; no other was sampled.`));
    }
    const chooser = (key, title, values, text) => {
      if (values.length < 2) return;
      const select = el('select', { onchange() { shown[key] = values[this.selectedIndex]; draw(); } }, ...values.map((value) => el('option', {}, text(value))));
      select.selectedIndex = values.indexOf(shown[key]);
      select.dataset.key = key;
      found.push(el('label', {}, el('span', {}, title), select));
    };
    chooser('prompt', 'Prompt', distinct(1), (prompt) => prompt);
    chooser('seed', 'Seed', distinct(3), (seed) => `${seed}`);
    return found;
  }

  // What follows the controls

  function draw() {
    const stage = dialog.querySelector('.stage');
    if (!stage) return;
    stage.replaceChildren(...shown.merges.map(figure));
    stage.classList.toggle('many', shown.merges.length > 1);
    strip();
    const facts = dialog.querySelector('.facts');
    const failures = [...facts.querySelectorAll('.failure')];
    const merge = shown.merges[shown.chosen];
    facts.replaceChildren(...failures, ...(merge.about ? about(merge) : [el('p', {}, 'What is known of this merge is not here yet: reload the page in a moment.')]));
  }

  const title = ({ entry, about }) => `${entry.method}${about && about.best ? `: ${about.best.method}` : ''}${entry.seed ? `, seed ${entry.seed}` : ''}`;

  function sampleOf(merge) {
    const samples = merge.about ? merge.about.samples : [];
    return samples.find(([, prompt, strength, seed]) => prompt === shown.prompt && strength === shown.strength && seed === shown.seed);
  }

  function figure(merge, place) {
    const sample = sampleOf(merge);
    const alt = `${shown.page.subjects[shown.view.cell.row]} in ${shown.page.styles[shown.view.cell.column]}, ${title(merge)}, style strength ${shown.strength}`;
    const picture = sample
      ? el('img', { src: ziplora.url(sample[0]), alt, onload: ziplora.crisp, onerror() { this.replaceWith(el('span', { class: 'nopicture' }, 'picture not here')); } })
      : el('span', { class: 'nopicture' }, 'not sampled so');
    const scores = [['style', merge.entry.scores.style], ['subject', merge.entry.scores.subject], ['text', merge.entry.scores.text]].filter(([, value]) => value !== null);
    const made = el('button', { type: 'button', class: 'figure', 'aria-pressed': `${place === shown.chosen}`, onclick() { shown.chosen = place; draw(); dialog.querySelectorAll('.figure')[place].focus(); } },
      picture, el('span', { class: 'caption' }, el('b', {}, title(merge)), ...scores.map(([label, value]) => el('span', {}, `${label} ${ziplora.shortly(value)}`))));
    made.dataset.key = `figure-${place}`;
    return made;
  }

  function strip() {
    const merge = shown.merges[shown.chosen];
    const samples = merge.about ? merge.about.samples : [];
    dialog.querySelector('.strip').replaceChildren(...(samples.length < 2 ? [] : samples).map(([key, prompt, strength, seed], place) => {
      const current = prompt === shown.prompt && strength === shown.strength && seed === shown.seed;
      const made = el('button', {
        type: 'button', 'aria-current': `${current}`, title: `${prompt} · strength ${strength} · seed ${seed}`,
        onclick() { Object.assign(shown, { prompt, strength, seed }); dialog.querySelector('.controls').replaceChildren(...controls()); draw(); dialog.querySelectorAll('.strip button')[place].focus(); },
      }, el('img', { src: ziplora.url(key), alt: `${prompt}, style strength ${strength}, seed ${seed}`, loading: 'lazy', decoding: 'async', onload: ziplora.crisp }),
      el('span', { 'aria-hidden': 'true' }, told(strength)));
      return made;
    }));
  }

  function about({ entry, about: all }) {
    const { page, view } = shown;
    const trigger = all.triggers.filter(Boolean).join(', ');
    const file = `${page.subjects[view.cell.row]}__${page.styles[view.cell.column]}__${entry.method.split(' ')[0]}-${entry.id.slice(0, 8)}.safetensors`;
    const sample = sampleOf({ about: all });
    const blocks = [];
    if (all.lora) {
      blocks.push(el('a', { class: 'download', href: ziplora.url(all.lora), download: file.replace(/[^A-Za-z0-9_.-]/g, '_') },
        el('b', {}, 'Download the LoRA'), el('span', {}, `${size(all.bytes)} · safetensors · ${title({ entry, about: all })}`)));
    }
    if (!all.lora && all.recipe) {
      blocks.push(el('a', { class: 'download', href: ziplora.url(all.recipe), download: file.replace(/[^A-Za-z0-9_.-]/g, '_').replace(/safetensors$/, 'json') },
        el('b', {}, 'Download the recipe'), el('span', {}, 'json · the two LoRAs take turns during sampling, so there is no merged LoRA')));
    }
    if (trigger) blocks.push(section('Trigger words', copied(trigger)));
    if (sample) blocks.push(section('Prompt', el('p', {}, sample[1]), el('p', { class: 'small' }, `seed ${sample[3]}, style strength ${told(sample[2])}`)));
    const scores = [['style', 'CLIP-I', all.scores[0]], ['subject', 'DINO', all.scores[1]], ['text', 'CLIP-T', all.scores[2]]];
    if (scores.some(([, , value]) => value !== null)) {
      blocks.push(section('Scores', ...scores.map(([label, judge, value]) => (value === null
        ? el('p', { class: 'small' }, `${label}: ${all.unscored[`${label}_alignment`] || 'not scored'}`)
        : el('div', { class: 'score' }, el('span', {}, label, el('small', {}, ` ${judge}`)), el('meter', { min: 0, max: 1, value: Math.max(0, value), 'aria-label': label }), el('b', {}, value.toFixed(3)))))));
    }
    if (all.best && Array.isArray(all.best.candidates)) blocks.push(section('Chosen from', tried(all.best)));
    const statistics = Object.entries(all.merge).map(([key, value]) => [words(key), plain(value)]).filter(([, value]) => value);
    if (statistics.length) blocks.push(section('The merge', table(statistics)));
    const made = [
      ...Object.entries(all.knobs || {}).filter(([, value]) => value !== null).map(([key, value]) => [words(key), plain(value)]),
      ['merge seed', `${entry.seed}`],
      ['weights', all.weights.every((weight) => weight !== null) ? all.weights.join(' and ') : ''],
      ['observed on', all.observed.some(Boolean) ? all.observed.map((source) => source || 'nothing').join(' and ') : ''],
    ].filter(([, value]) => value);
    const took = Object.entries(all.stages).filter(([, s]) => typeof s === 'number').map(([key, s]) => [key, `${s < 10 ? s.toFixed(1) : Math.round(s)} s`]);
    blocks.push(fold('Settings', table(made)));
    blocks.push(fold('How it was made', table([...took, ['on', all.device || ''], ['finished', all.created.replace('T', ' ').slice(0, 16)], ['job', entry.id]].filter(([, value]) => value))));
    return blocks;
  }

  // Of method `best`: every candidate in the order in which it was tried.
  function tried({ method, knobs, by, candidates, not_tried: rest }) {
    const won = (one) => one.method === method && JSON.stringify(one.knobs) === JSON.stringify(knobs);
    const told = (one) => (one.failed ? `failed: ${one.failed}` : `${ziplora.shortly(one.score)}, ${plain(one.seconds)} s${won(one) ? ', taken' : ''}`);
    return el('div', {}, table(candidates.map((one) => [one.method, told(one)])), el('p', { class: 'small' }, [`by ${by}`, rest && rest.length ? `not tried: ${rest.join(', ')}` : ''].filter(Boolean).join('; ')));
  }

  const section = (heading, ...children) => el('section', {}, el('h3', {}, heading), ...children);
  const fold = (heading, ...children) => el('details', {}, el('summary', {}, heading), ...children);
  const table = (rows) => el('table', {}, el('tbody', {}, ...rows.map(([key, value]) => el('tr', {}, el('th', { scope: 'row' }, key), el('td', {}, value)))));
  const words = (key) => key.replaceAll('_', ' ');

  function plain(value) {
    if (typeof value === 'number') return Number.isInteger(value) ? `${value}` : value.toPrecision(3);
    if (typeof value === 'boolean') return value ? 'yes' : 'no';
    if (typeof value === 'string') return value;
    if (Array.isArray(value) && value.length === 2 && value.every((one) => typeof one === 'number')) return `${plain(value[0])} → ${plain(value[1])}`;
    if (Array.isArray(value) && value.length && value.every((one) => typeof one === 'number')) return value.length <= 6 ? value.map(plain).join(', ') : curve(value);
    if (value && typeof value === 'object' && !Array.isArray(value)) return Object.entries(value).map(([key, one]) => `${words(key)} ${typeof one === 'object' ? '…' : plain(one)}`).join(', ');
    return '';
  }

  function curve(values) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const points = values.map((value, i) => `${(100 * i) / (values.length - 1)},${24 - (22 * (value - low)) / (high - low || 1)}`).join(' ');
    const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
    const line = document.createElementNS('http://www.w3.org/2000/svg', 'polyline');
    line.setAttribute('points', points);
    svg.setAttribute('viewBox', '0 0 100 26');
    svg.setAttribute('role', 'img');
    svg.setAttribute('aria-label', `from ${plain(values[0])} to ${plain(values[values.length - 1])}`);
    svg.append(line);
    return svg;
  }

  function size(bytes) {
    if (bytes === null) return '';
    const units = [['GB', 1e9], ['MB', 1e6], ['kB', 1e3]];
    const [unit, one] = units.find(([, least]) => bytes >= least) || ['B', 1];
    return `${one === 1 ? bytes : (bytes / one).toFixed(1)} ${unit}`;
  }

  function copied(text) {
    const note = el('span', { role: 'status' });
    const made = el('button', { type: 'button', class: 'quiet', async onclick() { note.textContent = (await copy(text, code)) ? 'copied' : 'select and copy it'; } }, 'Copy');
    made.dataset.key = 'copy';
    const code = el('code', {}, text);
    return el('p', { class: 'copy' }, code, made, note);
  }

  async function copy(text, element) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {  // a page that came over plain HTTP has no clipboard
      getSelection().selectAllChildren(element);
      return document.execCommand('copy');
    }
  }

  dialog.addEventListener('close', () => { number += 1; onClosed(); });
  dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); });

  return { open, get isOpen() { return dialog.open; }, set onStep(handler) { onStep = handler; }, set onClosed(handler) { onClosed = handler; } };
})();
