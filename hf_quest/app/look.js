// Runs once in the strip and once in the sources: a click or the arrow keys choose a page, and a sentence lights the
// pages that it drew on.
const root = element.closest('.gradio-container');
const pages = () => root.querySelectorAll('.hq-strip [data-page]');
const chosen = () => (root.dataset.hqPage === undefined ? null : Number(root.dataset.hqPage));

function mark(page) {
  root.dataset.hqPage = page;
  for (const each of root.querySelectorAll('.hq-look [data-page]')) {
    each.classList.toggle('on', Number(each.dataset.page) === page);
  }
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
  if (!event.target.classList.contains('hq-strip')) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) mark(Math.min(Math.max((chosen() ?? -1) + step, 0), pages().length - 1));
  else if (event.key === 'Enter') choose(chosen() ?? 0);
  else return;
  event.preventDefault();
});

watch('value', () => {
  if (!pages().length) delete root.dataset.hqPage;
  if (chosen() !== null) mark(chosen());
});

element.addEventListener('mouseover', (event) => {
  const sentence = event.target.closest('[data-pages]');
  const hinted = sentence ? sentence.dataset.pages.split(',') : [];
  for (const each of pages()) each.classList.toggle('hint', hinted.includes(each.dataset.page));
});
