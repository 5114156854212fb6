// The fields over the gallery: what one has, a callback or a module, a word. Without JavaScript all cards are shown, and no fields.
for (const filter of document.querySelectorAll(".gallery-filter")) {
  const [having, form] = filter.querySelectorAll("select");
  const word = filter.querySelector("input");
  const cards = [...filter.nextElementSibling.querySelectorAll("a")];
  const update = () => {
    const slugs = having.value ? having.value.split(" ") : null;
    const wanted = word.value.trim().toLowerCase();
    let shown = 0;
    for (const card of cards) {
      const text = `${card.dataset.slug} ${card.textContent}`.toLowerCase();
      card.hidden = Boolean((slugs && !slugs.includes(card.dataset.slug)) || (form.value && card.dataset.form !== form.value) || !text.includes(wanted));
      shown += card.hidden ? 0 : 1;
    }
    filter.querySelector("output").textContent = `${shown} of ${cards.length}`;
  };
  filter.addEventListener("input", update);
  filter.hidden = false;
  update();
}
