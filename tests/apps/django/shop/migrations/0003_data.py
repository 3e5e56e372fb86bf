from django.db import migrations
def fill(apps, schema_editor):
    Writer, Book = apps.get_model("shop", "Writer"), apps.get_model("shop", "Book")
    for w in range(1, 4):
        writer = Writer.objects.create(name=f"writer {w}")
        for b in range(5):
            Book.objects.create(title=f"book {w}-{b}", writer=writer, pages=str(100 * w + b))
class Migration(migrations.Migration):
    dependencies = [("shop", "0002_more")]
    operations = [migrations.RunPython(fill)]
