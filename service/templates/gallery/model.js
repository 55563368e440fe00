'use strict';
// What the gallery shows, apart from how: data as it is loaded, chosen, filtered and ordered. No DOM but script tags.

const ziplora = { take: {}, model: {} };

(() => {
  const SCORES = ['style', 'subject', 'text'];
  const waiting = new Map();  // scripts under way, by URL
  const groups = new Map();   // details by group's file

  ziplora.load = (url) => {
    if (!waiting.has(url)) {
      waiting.set(url, new Promise((resolve, reject) => {
        const script = document.createElement('script');
        script.src = url;
        script.onload = () => { script.remove(); waiting.delete(url); resolve(); };
        script.onerror = () => { script.remove(); waiting.delete(url); reject(new Error(url)); };
        document.head.append(script);
      }));
    }
    return waiting.get(url);
  };

  // A key of the catalog as a relative URL: whatever it holds, it leads nowhere else.
  ziplora.url = (key) => key.split('/').map(encodeURIComponent).join('/');

  ziplora.take.rows = ({ group, rows }) => groups.set(group, new Map(rows.map((row) => [row.id.slice(0, 16), row])));
  ziplora.take.live = (live) => { ziplora.model.live = live; };
  ziplora.take.catalog = (page) => { ziplora.model.page = read(page); };

  // All about one merge; rejects where its file is not there.
  ziplora.details = async (entry) => {
    const group = entry.id.slice(0, 2);
    const found = () => groups.get(group) && groups.get(group).get(entry.id);
    if (!found()) await ziplora.load(`pages/rows/${group}-1${ziplora.model.page.groups[group]}.js`);
    if (!found()) throw new Error(`nothing about ${entry.id}`);
    return found();
  };

  function read(page) {
    const cells = new Map();
    const at = (row, column) => {
      const key = row * page.styles.length + column;
      if (!cells.has(key)) cells.set(key, { row, column, entries: [], failures: [] });
      return cells.get(key);
    };
    let scored = false;
    for (const [row, column, method, seed, id, style, subject, text, template, first, second, sampleSeed, shown] of page.cells) {
      const entry = {
        id, seed, sampleSeed, shown: Boolean(shown), method: page.methods[method],
        prompt: render(page.texts[template], page.texts[first], page.texts[second]),
        scores: { style: share(style), subject: share(subject), text: share(text) },
      };
      entry.scores.overall = overall(entry.scores);
      scored = scored || SCORES.some((name) => entry.scores[name] !== null);
      at(row, column).entries.push(entry);
    }
    for (const [row, column, method, kind, reason, attempts] of page.failures) {
      at(row, column).failures.push({ method: page.methods[method], kind, reason, attempts });
    }
    return { ...page, cells, scored, merges: page.cells.length };
  }

  const share = (value) => (value === null ? null : value / 1000);

  // The harmonic mean of style and subject, as `ziplora pull --top` ranks them.
  function overall({ style, subject }) {
    if (style === null || subject === null) return null;
    return Math.min(style, subject) > 0 ? (2 * style * subject) / (style + subject) : Math.min(style, subject);
  }

  function render(template, subject, style) {
    const parts = { '{{': '{', '}}': '}', '{subject}': subject, '{style}': style };
    return template.replace(/\{\{|\}\}|\{subject\}|\{style\}/g, (part) => parts[part]);
  }

  // The merge that stands for a cell: of the chosen method, or the best scored one, or the first.
  ziplora.choose = (cell, { method, score }) => {
    const among = method ? cell.entries.filter((entry) => entry.method === method) : cell.entries;
    return among.reduce((best, entry) => {
      if (!best) return entry;
      const [a, b] = [entry.scores[score], best.scores[score]];
      return a !== null && (b === null || a > b) ? entry : best;
    }, null);
  };

  // Rows and columns in order, and of each cell what is shown: {rows, columns, at(row, column), low, high, shown}.
  ziplora.arrange = (page, choice) => {
    const words = choice.find.toLowerCase().split(/\s+/).filter(Boolean);
    const views = new Map();
    const sums = { rows: new Map(), columns: new Map() };
    const values = [];
    let shown = 0;
    for (const [key, cell] of page.cells) {
      const entry = ziplora.choose(cell, choice);
      const failures = cell.failures.filter((failure) => !choice.method || failure.method === choice.method);
      if (!entry && !failures.length) continue;
      const value = entry ? entry.scores[choice.score] : null;
      const text = [page.subjects[cell.row], page.styles[cell.column], entry ? entry.prompt : failures[0].reason]
        .join('\n').toLowerCase();
      const matches = words.every((word) => text.includes(word)) && (choice.floor === null || (value !== null && value >= choice.floor));
      views.set(key, { cell, entry, failures, value, matches });
      if (value !== null) values.push(value);
      if (!matches) continue;
      shown += 1;
      add(sums.rows, cell.row, value);
      add(sums.columns, cell.column, value);
    }
    const filtered = words.length > 0 || choice.floor !== null;
    const rows = order(page.subjects, sums.rows, filtered, choice.order);
    const columns = order(page.styles, sums.columns, filtered, choice.order);
    values.sort((a, b) => a - b);
    return {
      rows, columns, shown, filtered,
      low: values.length ? values[Math.floor(values.length * 0.02)] : 0,
      high: values.length ? values[Math.ceil(values.length * 0.98) - 1] : 1,
      at: (row, column) => views.get(row * page.styles.length + column),
    };
  };

  function add(sums, place, value) {
    const sum = sums.get(place) || { n: 0, total: 0 };
    if (value !== null) { sum.n += 1; sum.total += value; }
    sums.set(place, sum);
  }

  function order(names, sums, filtered, by) {
    const collator = new Intl.Collator(undefined, { numeric: true });
    const places = names.map((_, place) => place).filter((place) => !filtered || sums.has(place));
    const mean = (place) => { const sum = sums.get(place); return sum && sum.n ? sum.total / sum.n : null; };
    const sign = by === 'worst' ? 1 : -1;
    return places.sort((a, b) => {
      const [x, y] = [mean(a), mean(b)];
      if (by !== 'name' && x !== y) {
        if (x === null || y === null) return x === null ? 1 : -1;
        return sign * (x - y);
      }
      return collator.compare(names[a], names[b]);
    });
  }

  // A colour between blue and yellow through teal (after viridis: even steps, and read by colour-blind people too).
  const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  ziplora.heat = (share) => {
    const x = Math.min(1, Math.max(0, share)) * (STOPS.length - 1);
    const i = Math.min(STOPS.length - 2, Math.floor(x));
    const rgb = STOPS[i].map((value, channel) => Math.round(value + (STOPS[i + 1][channel] - value) * (x - i)));
    const dark = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 140;
    return { fill: `rgb(${rgb.join(' ')})`, ink: dark ? '#fff' : '#111' };
  };

  ziplora.shortly = (value) => (value === null ? '–' : value.toFixed(2));
})();
