from django.db import migrations, models
def upper(apps, schema_editor):
    for book in apps.get_model("shop", "Book").objects.all():
        book.slug = f"book-{book.pk}"
        book.save()
class Migration(migrations.Migration):
    dependencies = [("shop", "0004_alter")]
    operations = [
        migrations.RunPython(upper),
        migrations.RemoveField("author", "born"),
        migrations.RemoveField("book", "note"),
        migrations.AddConstraint("book", models.CheckConstraint(condition=models.Q(pages__gte=0), name="some_pages")),
        migrations.AlterUniqueTogether("book", {("name", "writer")}),
    ]
