// Runs once in the strip and once in the sources: a click or the keyboard chooses a passage, and a sentence lights the
// passages that it drew on.
const root = element.closest('.gradio-container');
const strip = () => root.querySelector('.hq-strip[role="slider"]');
const pages = () => root.querySelectorAll('.hq-strip [data-page]');
const chosen = () => (root.dataset.hqPage === undefined ? null : Number(root.dataset.hqPage));

// The PDF page and the heading that a passage is under.
function place(page) {
  const places = JSON.parse(strip().dataset.places);
  const under = (entries) => entries.filter(([first]) => first <= page).pop()?.[1];
  return [`Passage ${page + 1}`, under(places.marks), under(places.headings)].filter(Boolean).join(' · ');
}

function tell(page) {
  const here = root.querySelector('.hq-here');
  if (here && strip()) here.textContent = page === null ? '' : place(page);
}

function mark(page) {
  root.dataset.hqPage = page;
  for (const each of root.querySelectorAll('.hq-look [data-page]')) {
    each.classList.toggle('on', Number(each.dataset.page) === page);
  }
  strip()?.setAttribute('aria-valuenow', page + 1);
  strip()?.setAttribute('aria-valuetext', place(page));
  tell(page);
}

function choose(page) {
  mark(page);
  trigger('select', { page });
}

element.addEventListener('click', (event) => {
  const target = event.target.closest('[data-page]');
  if (target) choose(Number(target.dataset.page));
});

element.addEventListener('keydown', (event) => {
  if (event.target !== strip()) return;
  const columns = getComputedStyle(strip()).gridTemplateColumns.split(' ').length;
  const last = pages().length - 1;
  const now = chosen() ?? 0;
  const to = {
    ArrowLeft: now - 1,
    ArrowRight: now + 1,
    ArrowUp: now - columns,
    ArrowDown: now + columns,
    Home: 0,
    End: last,
  }[event.key];
  if (to !== undefined) mark(Math.min(Math.max(to, 0), last));
  else if (event.key === 'Enter') choose(now);
  else return;
  event.preventDefault();
});

watch('value', () => {
  if (!pages().length || chosen() >= pages().length) delete root.dataset.hqPage;
  if (chosen() !== null) mark(chosen());
});

element.addEventListener('mouseover', (event) => {
  const sentence = event.target.closest('[data-pages]');
  const hinted = sentence ? sentence.dataset.pages.split(',') : [];
  for (const each of pages()) each.classList.toggle('hint', hinted.includes(each.dataset.page));
  const page = event.target.closest('[data-page]');
  if (page) tell(Number(page.dataset.page));
});

element.addEventListener('mouseleave', () => tell(chosen()));
