'use strict';
// Shows one question after the other. Every choice is sent at once; what the server has not confirmed is sent again.

(() => {
  const byId = (id) => document.getElementById(id);
  const KEY = 'ziplora-study';
  const SOONEST_MS = 150;  // nobody has looked at a question for less: it is the second half of a double click
  let state = null, seen = 0, busy = false;

  async function ask(path, given) {
    const options = given === undefined ? {} : { method: 'POST', body: JSON.stringify(given), headers: { 'Content-Type': 'application/json' } };
    const answer = await fetch(path, options);
    if (!answer.ok) throw Object.assign(new Error(answer.statusText), { status: answer.status });
    return answer.json();
  }

  function show(next) {
    state = next;
    byId('welcome').hidden = true;
    byId('question').hidden = !state.question;
    byId('thanks').hidden = Boolean(state.question);
    if (!state.question) return;
    byId('count').textContent = `${state.answered + 1} of ${state.asked}`;
    document.querySelector('.track span').style.width = `${(100 * state.answered) / state.asked}%`;
    const at = `/picture/${state.participant}/${state.question}/`;
    for (const which of ['subject', 'style']) byId(which).src = at + which;
    for (const side of ['left', 'right']) {
      byId(side).querySelector('img').src = at + side;
      byId(side).setAttribute('aria-disabled', 'false');
    }
    document.body.dataset.question = state.question;
    seen = performance.now();
    busy = false;
  }

  async function choose(side) {
    if (busy || !state || !state.question || performance.now() - seen < SOONEST_MS) return;
    busy = true;
    for (const one of ['left', 'right']) byId(one).setAttribute('aria-disabled', 'true');
    const ms = Math.round(performance.now() - seen);
    for (let wait = 500; ; wait = Math.min(15000, wait * 2)) {
      try {
        const next = await ask(`/api/${state.participant}/${state.question}`, { side, ms });
        byId('problem').textContent = '';
        show(next);
        return;
      } catch (error) {
        byId('problem').textContent = 'Your answer is not saved yet; trying again …';
        await new Promise((resolve) => setTimeout(resolve, wait));
      }
    }
  }

  async function begin() {
    if (busy) return;
    busy = true;
    try {
      const next = await ask('/api/begin', {});
      localStorage.setItem(KEY, next.participant);
      show(next);
    } catch {
      busy = false;
      byId('begin').textContent = 'Try again';
    }
  }

  async function resume() {
    const participant = localStorage.getItem(KEY);
    if (!participant) return;
    try { show(await ask(`/api/${participant}`)); } catch (error) {
      if (error.status === 404) localStorage.removeItem(KEY);  // of another study
    }
  }

  for (const image of document.images) image.addEventListener('load', () => image.classList.toggle('crisp', image.naturalWidth <= 128));
  byId('begin').addEventListener('click', begin);
  for (const side of ['left', 'right']) byId(side).addEventListener('click', (event) => { if (event.detail < 2) choose(side); });
  document.addEventListener('keydown', (event) => {
    if (event.repeat || byId('question').hidden) return;
    if (event.key === 'ArrowLeft') choose('left');
    if (event.key === 'ArrowRight') choose('right');
  });
  resume();
})();
